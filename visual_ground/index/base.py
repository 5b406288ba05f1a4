"""What `generate` needs of an index, and what an index needs of a grounded model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from visual_ground.index.engines.base import SearchResult
from visual_ground.vision.identity import ImageSpace
from visual_ground.vision.images import ImageLike


@runtime_checkable
class RetrievalIndex(Protocol):
    """What `GroundedModel.generate` needs of an index: `ImageIndex`, or any object with these members."""

    @property
    def dim(self) -> int:
        """q, the width of its vectors."""

    def search(self, vectors: Tensor, k: int) -> SearchResult:
        """Return the k best entries for each query (queries, q), fewer if the index is smaller.

        If `generate` was given a filter, it is passed on as `filter=`.
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
