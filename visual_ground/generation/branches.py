"""Branches of a running `generate`: ids that the LM reads after its sequences, and that are not in its answer."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from visual_ground.adapter.attached import AttachedAdapter
from visual_ground.lm.frozen_lm import FrozenLM
from visual_ground.lm.hook_context import context_of
from visual_ground.lm.key_values import copy_of, plain_layers, shortened

logger = logging.getLogger(__name__)

# How far apart unit vectors may be that were read in one pass and one by one: what rounding does, also in TF32.
ROUNDING = 1e-3


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


class BranchReader:
    """Reads branches on copies of the keys and values of the LM's running `generate`, which it leaves as they are.

    Branches of different places are read in one pass, each seeing only what comes before it. Whether an LM can do that
    depends on how it makes its attention masks. The first time in each range of lengths (powers of two) and for each
    attention implementation, branches are also read one by one. If the results differ, they are read one by one in
    that range from then on.

    Args:
        frozen_lm: the LM, inside its `generate`.
        attached: the active adapter.
        mask: (b, s), of the positions that were run.
    """

    def __init__(self, frozen_lm: FrozenLM, attached: AttachedAdapter, mask: Tensor) -> None:
        self.frozen_lm, self.attached, self.mask = frozen_lm, attached, mask
        context = context_of(frozen_lm.virtual_tokens)
        self._cache: Any = None if context is None else context.cache
        self._layers = plain_layers(self._cache, mask.shape[1])
        self._image_tokens = None if context is None else context.image_tokens

    @torch.no_grad()
    def read(self, branches: Sequence[Branch]) -> dict[Branch, Tensor]:
        """Return the vector (q,), on the CPU, read at the last id of each branch.

        A branch is missing if the LM keeps anything but plain keys and values (such as a state space), if a sliding
        window has dropped keys and values that it needs, or if it is longer than the LM's context.
        """
        longest = self.frozen_lm.max_length
        if self._layers is None:
            return {}
        fitting = [one for one in branches if longest is None or one.kept + len(one.ids) <= longest]
        vectors: dict[Branch, Tensor] = {}
        for part in _of_similar_length(fitting):
            vectors |= self._read_part(part)
        return {branch: vector.cpu() for branch, vector in vectors.items()}

    def _read_part(self, branches: list[Branch]) -> dict[Branch, Tensor]:
        if len(_alike(branches)) == 1 or not self._shows_all(branches):
            return self._one_by_one(branches)
        implementation = getattr(self.frozen_lm.lm.config, "_attn_implementation", None)
        place = implementation, self.mask.shape[1].bit_length()
        agree = self.frozen_lm.reads_branches.get(place)
        if agree:
            return self._together(branches)
        expected = self._one_by_one(branches)
        if agree is None:
            self.frozen_lm.reads_branches[place] = self._agrees(branches, expected)
        return expected

    def _agrees(self, branches: list[Branch], expected: dict[Branch, Tensor]) -> bool:
        try:
            found = self._together(branches)
        except Exception as error:  # Whatever an LM says of a mask that it does not know.
            logger.debug("this LM reads branches one by one: %s", error)
            return False
        tolerance = max(ROUNDING, torch.finfo(self.frozen_lm.dtype).eps ** 0.5)
        return all(bool((found[one] - vector).norm() <= tolerance) for one, vector in expected.items())

    def _shows_all(self, branches: list[Branch]) -> bool:
        """Return whether every layer may see all of these positions.

        A layer with a shorter sliding window needs a mask of its own, and only one mask is passed for all layers.
        """
        assert self._layers is not None, "there are plain keys and values"
        length = self.mask.shape[1] + max(map(_width, _by_row(branches)))
        windows = [getattr(layer, "sliding_window", None) for layer in self._layers]
        return all(window is None or window >= length for window in windows)

    def _together(self, branches: list[Branch]) -> dict[Branch, Tensor]:
        """Put the branches of a row one after another; each sees only its own ids and the positions it continues."""
        rows, length = _by_row(branches), self.mask.shape[1]
        width = max(map(_width, rows))
        device, shape = self.mask.device, (len(rows), width)
        ids = torch.full(shape, self.frozen_lm.vocabulary.safe_id, device=device)
        positions = torch.zeros(shape, dtype=torch.long, device=device)
        sees = torch.zeros(*shape, length + width, dtype=torch.bool, device=device)
        sees[..., length:] = torch.eye(width, dtype=torch.bool, device=device)  # Padding sees only itself.
        causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        last: dict[Branch, int] = {}
        for i, row in enumerate(rows):
            end = 0
            for branch in row:
                begin, end = end, end + len(branch.ids)
                kept = self.mask[branch.row, : branch.kept].bool()
                ids[i, begin:end] = torch.tensor(branch.ids, device=device)
                positions[i, begin:end] = kept.sum() + torch.arange(end - begin, device=device)
                sees[i, begin:end, : branch.kept] = kept
                sees[i, begin:end, length + begin : length + end] = causal[: end - begin, : end - begin]
                last[branch] = i * width + end - 1
        hidden = torch.zeros(sees.shape, dtype=self.frozen_lm.dtype, device=device)
        hidden = hidden.masked_fill(~sees, torch.finfo(hidden.dtype).min)[:, None]
        # No logits are needed.
        options = {"position_ids": positions, "max_logits": 0}
        return self._run([row[0].row for row in rows], length, ids, hidden, last, **options)

    def _one_by_one(self, branches: list[Branch]) -> dict[Branch, Tensor]:
        """Read branches of the same place and length together, in rows of their own."""
        length = self.mask.shape[1]
        vectors: dict[Branch, Tensor] = {}
        assert self._layers is not None, "there are plain keys and values"
        for group in _alike(branches):
            kept, count = group[0].kept, len(group[0].ids)
            # A sliding window that has moved has dropped keys and values that this branch needs.
            if kept < length and any(layer.keys.shape[-2] != length for layer in self._layers):
                continue
            rows = [branch.row for branch in group]
            mask = torch.nn.functional.pad(self.mask[rows, :kept], (0, count), value=1)
            ids = torch.tensor([branch.ids for branch in group], device=mask.device)
            last = {branch: (i + 1) * count - 1 for i, branch in enumerate(group)}
            vectors |= self._run(rows, kept, ids, mask, last)
        return vectors

    def _run(
        self, rows: list[int], kept: int, ids: Tensor, mask: Tensor, last: dict[Branch, int], **options: Any
    ) -> dict[Branch, Tensor]:
        """Run ids (r, n) after the first `kept` positions of some rows; return vectors (q,) of flat positions."""
        chosen = torch.tensor(rows, device=self.mask.device)
        is_all = rows == list(range(len(self.mask)))
        cache = copy_of(self._cache, lambda kv: kv if is_all else kv[chosen.to(kv.device)])
        if kept < self.mask.shape[1]:
            cache = shortened(cache, kept)
        positions = torch.tensor([*last.values()], device=ids.device)
        layers, options = self.attached.config.text_layers, {"max_logits": 1, **options}
        reading = self.frozen_lm.read(
            ids, mask, positions, self._image_tokens, layers, cache=cache, use_cache=True, **options
        )
        return dict(zip(last, self.attached.embed_states(reading.states), strict=True))


def _width(branches: Iterable[Branch]) -> int:
    return sum(len(branch.ids) for branch in branches)


def _by_row(branches: Iterable[Branch]) -> list[list[Branch]]:
    return [list(row) for _, row in groupby(sorted(branches, key=lambda one: one.row), lambda one: one.row)]


def _alike(branches: Iterable[Branch]) -> list[list[Branch]]:
    """Return branches of the same place and length together."""
    groups: dict[tuple[int, int], list[Branch]] = {}
    for branch in branches:
        groups.setdefault((branch.kept, len(branch.ids)), []).append(branch)
    return [*groups.values()]


def _of_similar_length(branches: Iterable[Branch]) -> list[list[Branch]]:
    """Return the branches of rows that have about as many ids together, so that at most half of a pass is padding."""
    parts: list[list[list[Branch]]] = []
    for row in sorted(_by_row(branches), key=_width):
        if not parts or _width(row) > 2 * _width(parts[-1][0]):
            parts.append([])
        parts[-1].append(row)
    return [[branch for row in part for branch in row] for part in parts]
