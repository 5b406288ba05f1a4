"""`VectorIndex`: what a search engine must offer to carry an image index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class SearchResult:
    """The best entries for each query, best first.

    Args:
        positions: (queries, m) long, positions in the index.
        scores: (queries, m) float, inner products.
    """

    positions: Tensor
    scores: Tensor


@runtime_checkable
class VectorIndex(Protocol):
    """A search engine: vectors by position, with no knowledge of what they stand for.

    `ImageIndex` puts ids, images and metadata beside one. `ExactIndex` is the engine that is built in. The first vector
    has position 0, and each further one the next. To be saved with an index, see `visual_ground.index.engines.saved`.
    """

    @property
    def dim(self) -> int:
        """q, the width of its vectors."""

    def __len__(self) -> int: ...

    def add(self, vectors: Tensor) -> None:
        """Append vectors (m, q); they get the next positions, and no position is ever given twice."""

    def remove(self, positions: Sequence[int]) -> None:
        """Take vectors out; the others keep their positions."""

    def search(self, vectors: Tensor, k: int, filter: Tensor | None = None) -> SearchResult:
        """Return the k best entries for each query, fewer if fewer are allowed.

        Args:
            vectors: (queries, q).
            k: how many, at least 1.
            filter: bool, one for each position that was ever given, True if it may be found; None: all.
        """
