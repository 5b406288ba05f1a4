"""`ImageIndex`: exact search over image vectors, saved as safetensors with the ids and metadata beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from visual_ground.errors import GroundingFileError, GroundingIndexError, GroundingValueError
from visual_ground.saving import write_json, write_tensors

if TYPE_CHECKING:
    from visual_ground.model import GroundedModel

VECTORS_FILE = "index.safetensors"
ENTRIES_FILE = "index.json"


@dataclass(frozen=True)
class SearchResult:
    """The best entries for each query, best first.

    Args:
        positions: (queries, m) long, positions in the index.
        scores: (queries, m) float, inner products.
    """

    positions: Tensor
    scores: Tensor


class ImageIndex:
    """Image vectors with what they stand for.

    Args:
        vectors: (n, q) unit vectors.
        ids: n distinct names; 0 to n - 1 where None.
        images: n PIL images or paths, or None.
        metadata: n mappings, or None.

    Raises:
        GroundingValueError: lengths differ, ids repeat, or vectors are not (n, q) and finite.
    """

    def __init__(
        self,
        vectors: Tensor,
        ids: Sequence[str | int] | None = None,
        images: Sequence[Any] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        if vectors.dim() != 2 or not torch.isfinite(vectors).all():
            raise GroundingValueError(f"vectors must be finite and (n, q), got shape {tuple(vectors.shape)}.")
        self.vectors = vectors.detach().float().cpu().contiguous()
        self.ids = list(range(len(vectors))) if ids is None else list(ids)
        self.images = None if images is None else list(images)
        self.metadata = None if metadata is None else [dict(entry) for entry in metadata]
        for name in ("ids", "images", "metadata"):
            values = getattr(self, name)
            if values is not None and len(values) != len(vectors):
                raise GroundingValueError(f"{len(vectors)} vectors need as many {name}, got {len(values)}.")
        if len(set(self.ids)) != len(self.ids):
            raise GroundingValueError("ids must be distinct; give each image its own.")

    @classmethod
    def build(
        cls,
        model: GroundedModel,
        images: Sequence[Any],
        ids: Sequence[str | int] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        batch_size: int = 32,
    ) -> ImageIndex:
        """Embed images and index them.

        Args:
            model: the grounded model, whose image layer gives the vectors.
            images: PIL images or paths; paths are kept as paths.
            ids: as in the class.
            metadata: as in the class.
            batch_size: images embedded at once.
        """
        if not len(images):
            raise GroundingValueError("An index needs at least one image, got none.")
        parts = [model.embed_images(images[i : i + batch_size]) for i in range(0, len(images), batch_size)]
        return cls(torch.cat(parts), ids, images, metadata)

    def __len__(self) -> int:
        return len(self.vectors)

    def search(self, vectors: Tensor, k: int) -> SearchResult:
        """Return the k best entries for each query, fewer where the index is smaller.

        Args:
            vectors: (queries, q).
            k: how many, at least 1.

        Raises:
            GroundingValueError: k below 1, or another width than the index has.
        """
        if k < 1:
            raise GroundingValueError(f"k must be at least 1, got {k}.")
        if vectors.dim() != 2 or vectors.shape[1] != self.vectors.shape[1]:
            raise GroundingValueError(f"Queries must be (m, {self.vectors.shape[1]}), got {tuple(vectors.shape)}.")
        scores = vectors.detach().float().cpu() @ self.vectors.T
        best = scores.topk(min(k, len(self)), dim=-1)
        return SearchResult(best.indices, best.values)

    def entry(self, position: int) -> tuple[str | int, Any, Mapping[str, Any]]:
        """Return the id, image (or None) and metadata at a position."""
        if not 0 <= position < len(self):
            raise GroundingIndexError(f"Position {position} is outside this index of {len(self)} images.")
        image = None if self.images is None else self.images[position]
        return self.ids[position], image, {} if self.metadata is None else self.metadata[position]

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Save vectors, ids, paths and metadata; PIL images given as objects are not saved, so give paths."""
        paths = None
        if self.images is not None:
            paths = [os.fspath(i) if isinstance(i, (str, os.PathLike)) else None for i in self.images]
        write_tensors(Path(folder) / VECTORS_FILE, {"vectors": self.vectors})
        write_json(Path(folder) / ENTRIES_FILE, {"ids": self.ids, "images": paths, "metadata": self.metadata})

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> ImageIndex:
        """Load what `save_pretrained` wrote.

        Raises:
            GroundingFileError: a file is missing.
        """
        folder = Path(folder)
        for name in (VECTORS_FILE, ENTRIES_FILE):
            if not (folder / name).is_file():
                raise GroundingFileError(f"{str(folder)!r} is no image index: it has no {name}.")
        return cls(
            load_file(folder / VECTORS_FILE)["vectors"], **json.loads((folder / ENTRIES_FILE).read_text("utf-8"))
        )
