"""`ExactIndex`: search by exact inner products in torch, saved as safetensors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from visual_ground.errors import GroundingIndexError, GroundingValueError
from visual_ground.index.base import SearchResult
from visual_ground.storage.tensors import read_shapes, read_tensors, write_tensors


class ExactIndex:
    """Vectors in memory, each query compared with all of them.

    Args:
        vectors: (n, q), finite; kept as float32 on the CPU.

    Raises:
        GroundingValueError: vectors that are not (n, q) and finite.

    Example:
        >>> index = ExactIndex(torch.eye(3))
        >>> index.remove([0])
        >>> index.search(torch.tensor([[0.5, 0.1, 0.9]]), k=2).positions.tolist()
        [[1, 0]]
    """

    def __init__(self, vectors: Tensor) -> None:
        if vectors.dim() != 2 or not torch.isfinite(vectors).all():
            raise GroundingValueError(f"vectors must be finite and (n, q), got shape {tuple(vectors.shape)}.")
        self.vectors = vectors.detach().float().cpu().contiguous()

    @property
    def dim(self) -> int:
        """q, the width of its vectors."""
        return self.vectors.shape[1]

    def __len__(self) -> int:
        return len(self.vectors)

    def add(self, vectors: Tensor) -> None:
        """Append vectors (m, q); they get the positions from `len(self)` on.

        Raises:
            GroundingValueError: another width, or vectors that are not finite.
        """
        self._check_width(vectors, "Vectors to add")
        self.vectors = torch.cat([self.vectors, ExactIndex(vectors).vectors])

    def remove(self, positions: Sequence[int]) -> None:
        """Take vectors out; those after them move up.

        Raises:
            GroundingIndexError: a position outside the index; nothing has changed then.
        """
        if outside := [position for position in positions if not 0 <= position < len(self)]:
            raise GroundingIndexError(f"Positions {outside} are outside this index of {len(self)} vectors.")
        keep = torch.ones(len(self), dtype=torch.bool)
        keep[list(positions)] = False
        self.vectors = self.vectors[keep]

    def search(self, vectors: Tensor, k: int, filter: Tensor | None = None) -> SearchResult:
        """Return the k best entries for each query, fewer where fewer are allowed.

        Args:
            vectors: (queries, q).
            k: how many, at least 1.
            filter: (n,) bool, True at the positions that may be found; all where None.

        Raises:
            GroundingValueError: k below 1, queries of another width, or a filter that is not (n,) bool.
        """
        if k < 1:
            raise GroundingValueError(f"k must be at least 1, got {k}.")
        self._check_width(vectors, "Queries")
        scores = vectors.detach().float().cpu() @ self.vectors.T
        allowed = len(self)
        if filter is not None:
            if filter.dtype != torch.bool or filter.shape != (len(self),):
                raise GroundingValueError(
                    f"filter must be a mask ({len(self)},) of bool, got {tuple(filter.shape)} of {filter.dtype}."
                )
            scores, allowed = scores.masked_fill(~filter.cpu(), float("-inf")), int(filter.sum())
        best = scores.topk(min(k, allowed), dim=-1)
        return SearchResult(best.indices, best.values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file with the tensor `vectors` (n, q)."""
        write_tensors(path, {"vectors": self.vectors})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ExactIndex:
        """Read what `save` wrote.

        Raises:
            GroundingFileError: the file is missing or damaged.
            GroundingValueError: it holds other tensors, or vectors that are not finite.
        """
        path = Path(path)
        shapes = read_shapes(path)
        shape, dtype = shapes.get("vectors", ((), ""))
        if set(shapes) != {"vectors"} or len(shape) != 2 or dtype != "F32":
            raise GroundingValueError(f"{path} must hold vectors (n, q) of F32 and nothing else; it holds {shapes}.")
        return cls(read_tensors(path, {"vectors": torch.empty(shape, device="meta")})["vectors"])

    def _check_width(self, vectors: Tensor, what: str) -> None:
        if vectors.dim() != 2 or vectors.shape[1] != self.dim:
            raise GroundingValueError(f"{what} must be (m, {self.dim}), got {tuple(vectors.shape)}.")
