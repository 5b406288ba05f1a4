"""`ExactIndex`: search by exact inner products in torch, over vectors in memory or in a memory-mapped file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from visual_ground.errors import GroundingFileError, GroundingIndexError, GroundingValueError
from visual_ground.index.engines.base import SearchResult
from visual_ground.storage.tensors import map_tensor, read_shapes, write_rows

# Numbers that a search holds at once beside the vectors: scores, and vectors widened from float16.
CHUNK_NUMBERS = 1 << 22
STORED = {"F32": torch.float32, "F16": torch.float16}


@dataclass(frozen=True)
class _Rows:
    """Vectors by position, in blocks; never changed, so that a reader can go on while a writer makes the next one."""

    blocks: tuple[Tensor, ...]
    removed: Tensor | None = None

    @property
    def end(self) -> int:
        return sum(map(len, self.blocks))

    def without(self, positions: Sequence[int]) -> _Rows:
        if not len(positions):
            return self
        removed = torch.zeros(self.end, dtype=torch.bool)
        if self.removed is not None:
            removed |= self.removed
        outside = [p for p in positions if not 0 <= p < len(removed) or removed[p]]
        if outside:
            raise GroundingIndexError(f"Positions {outside} hold no vector of this index of {self.end} positions.")
        removed[list(positions)] = True
        return _Rows(self.blocks, removed)

    def followed_by(self, block: Tensor) -> _Rows:
        if not len(block):
            return self
        removed = self.removed
        if removed is not None:
            removed = torch.cat([removed, torch.zeros(len(block), dtype=torch.bool)])
        blocks = [*self.blocks, block]
        # Blocks that were added grow by doubling, so that a vector is copied log n times at most. The first block may
        # be a mapped file, and is never copied.
        while len(blocks) > 2 and len(blocks[-2]) <= 2 * len(blocks[-1]):
            blocks[-2:] = [torch.cat(blocks[-2:])]
        return _Rows(tuple(blocks), removed)

    def allowed(self, filter: Tensor | None) -> Tensor | None:
        if filter is not None and (filter.dtype != torch.bool or filter.shape != (self.end,)):
            raise GroundingValueError(
                f"filter must be a mask ({self.end},) of bool, got {tuple(filter.shape)} of {filter.dtype}."
            )
        if self.removed is None or filter is None:
            return filter if self.removed is None else ~self.removed
        return filter.cpu() & ~self.removed


class ExactIndex:
    """Vectors, each query compared with all of them. A search holds no copy of them.

    Args:
        vectors: (n, q), finite; float16 is kept as float16, anything else as float32, on the CPU.

    Raises:
        GroundingValueError: vectors that are not (n, q) and finite.

    Example:
        >>> index = ExactIndex(torch.eye(3))
        >>> index.remove([0])
        >>> index.search(torch.tensor([[0.5, 0.1, 0.9]]), k=2).positions.tolist()
        [[2, 1]]
    """

    def __init__(self, vectors: Tensor) -> None:
        self._rows = _Rows((as_block(vectors),))

    @property
    def vectors(self) -> Tensor:
        """The vectors (n, q) that were not removed, in order of their positions."""
        blocks = list(self.chunks(self._rows.end or 1))
        return blocks[0] if len(blocks) == 1 else torch.cat([self._rows.blocks[0][:0], *blocks])

    @property
    def dtype(self) -> torch.dtype:
        """float32 or float16."""
        return self._rows.blocks[0].dtype

    @property
    def dim(self) -> int:
        """q, the width of its vectors."""
        return self._rows.blocks[0].shape[1]

    def __len__(self) -> int:
        rows = self._rows
        return rows.end - (0 if rows.removed is None else int(rows.removed.sum()))

    @property
    def end(self) -> int:
        """How many positions were ever given."""
        return self._rows.end

    def allowed(self, filter: Tensor | None) -> Tensor | None:
        """Return the positions that may be found, as a mask; None for all."""
        return self._rows.allowed(filter)

    def changed(self, remove: Sequence[int], vectors: Tensor) -> ExactIndex:
        """Return an index without some positions and with more vectors; this one stays, and they share memory."""
        self._check_width(vectors, "Vectors to add")
        return ExactIndex._of(self._rows.without(remove).followed_by(as_block(vectors).to(self.dtype)))

    def add(self, vectors: Tensor) -> None:
        """Append finite vectors (m, q); they get the next positions."""
        self._rows = self.changed([], vectors)._rows

    def remove(self, positions: Sequence[int]) -> None:
        """Take vectors out, or none where one is not there (GroundingIndexError); the others keep their positions."""
        self._rows = self._rows.without(positions)

    def search(self, vectors: Tensor, k: int, filter: Tensor | None = None) -> SearchResult:
        """Return the k best entries for each query, as `VectorIndex.search`.

        Raises:
            GroundingValueError: k below 1, queries that are not finite or of another width, or another filter.
            GroundingFileError: the file holds numbers that are not finite.
        """
        if k < 1:
            raise GroundingValueError(f"k must be at least 1, got {k}.")
        self._check_width(vectors, "Queries")
        rows, queries = self._rows, as_block(vectors).float()
        allowed = rows.allowed(filter)
        k = min(k, rows.end if allowed is None else int(allowed.sum()))
        scores, positions = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long)
        start = 0
        for block in rows.blocks:
            for chunk in torch.split(block, _chunk_rows(len(queries), block)):
                found = _score(queries, chunk)
                if allowed is not None:
                    found.masked_fill_(~allowed[start : start + len(chunk)], float("-inf"))
                best = found.topk(min(k, len(chunk)), dim=-1)
                scores = torch.cat([scores, best.values], dim=-1)
                positions = torch.cat([positions, best.indices + start], dim=-1)
                if scores.shape[1] > best.values.shape[1]:
                    scores, order = scores.topk(min(k, scores.shape[1]), dim=-1)
                    positions = positions.gather(1, order)
                start += len(chunk)
        if not bool(torch.isfinite(scores).all()):
            raise GroundingFileError("The index's vectors are damaged: they hold numbers that are not finite.")
        return SearchResult(positions, scores)

    def at(self, positions: Sequence[int] | Tensor) -> Tensor:
        """Return the vectors (m, q) at some positions."""
        wanted, start = torch.as_tensor(positions, dtype=torch.long), 0
        rows = torch.empty(len(wanted), self.dim, dtype=self.dtype)
        for block in self._rows.blocks:
            here = (wanted >= start) & (wanted < start + len(block))
            rows[here] = block[wanted[here] - start]
            start += len(block)
        return rows

    def chunks(self, size: int = 1 << 16) -> Iterator[Tensor]:
        """Yield the vectors that were not removed, in order, at most `size` at once."""
        start = 0
        for block in self._rows.blocks:
            for chunk in torch.split(block, size):
                gone = None if self._rows.removed is None else self._rows.removed[start : start + len(chunk)]
                yield chunk if gone is None or not bool(gone.any()) else chunk[~gone]
                start += len(chunk)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file with the tensor `vectors` (n, q), without those that were removed."""
        write_rows(path, "vectors", (len(self), self.dim), self.dtype, self.chunks())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ExactIndex:
        """Open what `save` wrote, mapped into memory and unread; GroundingFileError where it is damaged."""
        path = Path(path)
        shapes = read_shapes(path)
        shape, dtype = shapes.get("vectors", ((), ""))
        if set(shapes) != {"vectors"} or len(shape) != 2 or dtype not in STORED:
            raise GroundingValueError(
                f"{path} must hold vectors (n, q) of F32 or F16 and nothing else; it holds {shapes}."
            )
        return cls._of(_Rows((map_tensor(path, "vectors"),)))

    @classmethod
    def of_blocks(cls, indexes: Iterable[ExactIndex]) -> ExactIndex:
        """Return the vectors of several indexes of the same width as one index, which shares their memory."""
        return cls._of(_Rows(tuple(one.vectors for one in indexes)))

    @classmethod
    def _of(cls, rows: _Rows) -> ExactIndex:
        index = cls.__new__(cls)
        index._rows = rows
        return index

    def _check_width(self, vectors: Tensor, what: str) -> None:
        if vectors.dim() != 2 or vectors.shape[1] != self.dim:
            raise GroundingValueError(f"{what} must be (m, {self.dim}), got {tuple(vectors.shape)}.")


def as_block(vectors: Tensor) -> Tensor:
    """Return vectors (n, q), finite ones, as float16 or float32 on the CPU, without a copy where they are."""
    # The smallest and largest show a NaN or infinity, and need no memory beside the vectors as `isfinite` does.
    if vectors.dim() != 2 or (vectors.numel() and not bool(torch.isfinite(torch.stack(vectors.aminmax())).all())):
        raise GroundingValueError(f"vectors must be finite and (n, q), got shape {tuple(vectors.shape)}.")
    return vectors.detach().to("cpu", torch.float16 if vectors.dtype == torch.float16 else torch.float32).contiguous()


def _chunk_rows(queries: int, block: Tensor) -> int:
    """Return how many vectors are scored at once: bound by their scores, and by their copy where they are float16."""
    width = max(queries, 1 if block.dtype == torch.float32 else block.shape[1])
    return max(1, CHUNK_NUMBERS // max(1, width))


def _score(queries: Tensor, chunk: Tensor) -> Tensor:
    if len(queries) == 1:  # A product with one vector runs at the speed of the memory; one with a matrix does not.
        return torch.mv(chunk.float(), queries[0])[None]
    return queries @ chunk.float().T
