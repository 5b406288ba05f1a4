"""Branches of a running `generate`: ids after the beginning of a sequence, and how several are read in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Branch:
    """Ids that the LM reads after the first `kept` positions of a sequence.

    Args:
        row: the sequence in the batch.
        kept: how many of its positions come before the ids, padding on the left counted.
        ids: at least one.
    """

    row: int
    kept: int
    ids: tuple[int, ...]


def branch_of(row: int, padding: int, sequence: Sequence[int], ids: Sequence[int]) -> Branch:
    """Return `ids` as a branch of `sequence`: what both begin with is not read again, only the rest.

    At least the last id is read.

    Args:
        row: the sequence's row.
        padding: positions on the left of it.
        sequence: its own ids.
        ids: what to read.
    """
    most = min(len(sequence), len(ids) - 1)
    shared = next((i for i in range(most) if sequence[i] != ids[i]), most)
    return Branch(row, padding + shared, tuple(ids[shared:]))


class Layout(NamedTuple):
    """The branches of each row one after another.

    Args:
        ids, positions: (r, w).
        mask: (r, 1, w, s + w), added to attention scores.
        last: where the last id of each branch is in the flattened ids.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    last: dict[Branch, int]


def laid_out(branches: Iterable[Branch], mask: Tensor, filler: int, dtype: torch.dtype) -> Layout:
    """Put the branches of each row one after another; each sees only its own ids and the positions it continues.

    Args:
        branches: of any rows.
        mask: (b, s), of the positions that were run.
        filler: the id that fills up rows.
        dtype: of the LM.
    """
    rows, length, device = by_row(branches), mask.shape[1], mask.device
    width = max(map(width_of, rows))
    shape = len(rows), width
    ids = torch.full(shape, filler, device=device)
    positions = torch.zeros(shape, dtype=torch.long, device=device)
    sees = torch.zeros(*shape, length + width, dtype=torch.bool, device=device)
    sees[..., length:] = torch.eye(width, dtype=torch.bool, device=device)  # Padding sees only itself.
    causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    last: dict[Branch, int] = {}
    for i, row in enumerate(rows):
        end = 0
        for branch in row:
            begin, end = end, end + len(branch.ids)
            kept = mask[branch.row, : branch.kept].bool()
            ids[i, begin:end] = torch.tensor(branch.ids, device=device)
            positions[i, begin:end] = kept.sum() + torch.arange(end - begin, device=device)
            sees[i, begin:end, : branch.kept] = kept
            sees[i, begin:end, length + begin : length + end] = causal[: end - begin, : end - begin]
            last[branch] = i * width + end - 1
    added = torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill(~sees, torch.finfo(dtype).min)
    return Layout(ids, positions, added[:, None], last)


def width_of(branches: Iterable[Branch]) -> int:
    """Return how many ids branches have together."""
    return sum(len(branch.ids) for branch in branches)


def by_row(branches: Iterable[Branch]) -> list[list[Branch]]:
    """Return the branches of each row together."""
    return [list(row) for _, row in groupby(sorted(branches, key=lambda one: one.row), lambda one: one.row)]


def alike(branches: Iterable[Branch]) -> list[list[Branch]]:
    """Return branches of the same place and length together."""
    groups: dict[tuple[int, int], list[Branch]] = {}
    for branch in branches:
        groups.setdefault((branch.kept, len(branch.ids)), []).append(branch)
    return [*groups.values()]


def of_similar_length(branches: Iterable[Branch]) -> list[list[Branch]]:
    """Return the branches of rows that have about as many ids together, so that at most half of a pass is padding."""
    parts: list[list[list[Branch]]] = []
    for row in sorted(by_row(branches), key=width_of):
        if not parts or width_of(row) > 2 * width_of(parts[-1][0]):
            parts.append([])
        parts[-1].append(row)
    return [[branch for row in part for branch in row] for part in parts]
