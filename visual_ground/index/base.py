"""What a search engine must offer to carry an image index, and what an index needs of a grounded model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from visual_ground.vision.identity import ImageSpace
from visual_ground.vision.images import ImageLike

if TYPE_CHECKING:
    from typing_extensions import Self


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
    has position 0, and each further one the next.
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
        """Return the k best entries for each query, fewer where fewer are allowed.

        Args:
            vectors: (queries, q).
            k: how many, at least 1.
            filter: bool, one for each position that was ever given, True where it may be found; all where None.
        """

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the vectors to one file; those that were removed are left out, and the rest move up."""

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote."""


@runtime_checkable
class RetrievalIndex(Protocol):
    """What `GroundedModel.generate` needs of an index: `ImageIndex`, or any object with these members."""

    @property
    def dim(self) -> int:
        """q, the width of its vectors."""

    def search(self, vectors: Tensor, k: int) -> SearchResult:
        """Return the k best entries for each query (queries, q), fewer where the index is smaller.

        Where `generate` was given a filter, it is passed on as `filter=`.
        """

    def entry(self, position: int) -> tuple[str | int, Any, Mapping[str, Any]]:
        """Return the id, image (or None) and metadata at a position."""


@runtime_checkable
class ManyEntries(Protocol):
    """An index that looks up several entries faster than one after another, as `ImageIndex` does."""

    def entries(self, positions: Sequence[int]) -> list[tuple[str | int, Any, Mapping[str, Any]]]:
        """Return what `RetrievalIndex.entry` returns, for each of these positions."""


class ImageEmbedder(Protocol):
    """What `ImageIndex.build` needs of a model, as `GroundedModel` has it."""

    @property
    def image_space(self) -> ImageSpace:
        """Which vectors it gives to images."""

    def embed_images(self, images: Sequence[ImageLike], *, batch_size: int) -> Tensor:
        """Map n images to unit vectors (n, q), `batch_size` of them run at once."""

    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """Map n texts to unit vectors (n, q); called only with a `caption_weight`."""
