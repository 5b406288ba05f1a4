"""Branches of a running `generate`: ids that the LM reads after its sequences, and that are not in its answer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visual_ground.adapter.attached import AttachedAdapter
from visual_ground.generation.layout import Branch, Layout, alike, by_row, laid_out, of_similar_length, width_of
from visual_ground.lm.frozen_lm import LAST, FrozenLM
from visual_ground.lm.key_values import copy_of, plain_layers, shortened
from visual_ground.lm.reading import ExtraIds

logger = logging.getLogger(__name__)

# How far apart unit vectors may be that were read in one pass and one by one: what rounding does, also in TF32.
ROUNDING = 1e-3


class BranchReader:
    """Reads branches beside the LM's running `generate`, whose keys and values are afterwards as they were.

    Branches of different places are read in one pass, each seeing only what comes before it. Whether an LM can do that
    depends on how it makes its attention masks. The first time in each range of lengths (powers of two) and for each
    attention implementation, branches are also read one by one. If the results differ, they are read one by one in
    that range from then on.

    Args:
        frozen_lm: the LM, inside its `generate`.
        attached: the active adapter.
        mask: (b, s), of the positions that were run.

    Attributes:
        image_tokens: (n * k, d), of the running `generate`, or None.
    """

    def __init__(self, frozen_lm: FrozenLM, attached: AttachedAdapter, mask: Tensor) -> None:
        self.frozen_lm, self.attached, self.mask = frozen_lm, attached, mask
        context = frozen_lm.virtual_tokens.context
        self._cache: Any = None if context is None else context.cache
        self._layers = plain_layers(self._cache, mask.shape[1])
        self.image_tokens = None if context is None else context.image_tokens

    @torch.no_grad()
    def read(self, branches: Sequence[Branch]) -> dict[Branch, Tensor]:
        """Return the vector (q,), on the CPU, read at the last id of each branch.

        A branch is missing if the LM takes one id at a time or keeps anything but plain keys and values (such as a
        state space), if a sliding window has dropped keys and values that it needs, or if it is longer than the LM's
        context.
        """
        if self._layers is None:
            return {}
        vectors: dict[Branch, Tensor] = {}
        for part in of_similar_length(filter(self._fits, branches)):
            try:
                vectors |= self._read_part(part)
            except Exception as error:  # Whatever an LM says of several ids behind what it has read.
                logger.debug("this LM reads no branches: %s", error)
        return {branch: vector.cpu() for branch, vector in vectors.items()}

    def join(self, branches: Sequence[Branch], token: int) -> JoinedBranches | None:
        """Let the next step of `generate` read branches together with its own id; None if `read` must read them.

        None if there are several sequences (all of them would become longer), if the LM is not yet known to read
        branches together, if `text_layers` asks for more than what the output head reads, or if a branch does not fit.

        Args:
            branches: of the one sequence.
            token: the step's own id, a virtual one.
        """
        context = self.frozen_lm.virtual_tokens.context
        own = Branch(0, self.mask.shape[1], (token,))
        if context is None or self._layers is None or len(self.mask) > 1 or not all(map(self._fits, branches)):
            return None
        is_last = tuple(self.attached.config.text_layers) == LAST
        if not (is_last and self._shows_all([own, *branches]) and self.frozen_lm.reads_branches.get(self._place)):
            return None
        # Without a retrieval prompt, the state at the step's own id is the one to be read.
        ids, positions, mask, last = self._layout([own, *(branch for branch in branches if branch != own)])
        context.extra = ExtraIds(self._cache, ids, positions, mask)
        return JoinedBranches(self.attached, context.extra, {branch: last[branch] for branch in branches})

    @property
    def _place(self) -> tuple[str | None, int]:
        """The attention implementation and the range of lengths: a key of `reads_branches`."""
        return getattr(self.frozen_lm.lm.config, "_attn_implementation", None), self.mask.shape[1].bit_length()

    def _layout(self, branches: Sequence[Branch]) -> Layout:
        return laid_out(branches, self.mask, self.frozen_lm.vocabulary.safe_id, self.frozen_lm.dtype)

    def _fits(self, branch: Branch) -> bool:
        longest = self.frozen_lm.max_length
        return longest is None or branch.kept + len(branch.ids) <= longest

    def _read_part(self, branches: list[Branch]) -> dict[Branch, Tensor]:
        if not self._shows_all(branches):
            return self._one_by_one(branches)
        agree = self.frozen_lm.reads_branches.get(self._place)
        if agree:
            return self._together(branches)
        expected = self._one_by_one(branches)
        if agree is None:
            self.frozen_lm.reads_branches[self._place] = self._agrees(branches, expected)
        return expected

    def _agrees(self, branches: list[Branch], expected: dict[Branch, Tensor]) -> bool:
        # After one more id, which none of them may see: otherwise an LM that ignores masks would pass with one branch.
        rows = dict.fromkeys(branch.row for branch in branches)
        others = [Branch(row, self.mask.shape[1], (self.frozen_lm.vocabulary.safe_id,)) for row in rows]
        try:
            found = self._together([*others, *branches])
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
        length = self.mask.shape[1] + max(map(width_of, by_row(branches)))
        windows = [getattr(layer, "sliding_window", None) for layer in self._layers]
        return all(window is None or window >= length for window in windows)

    def _together(self, branches: list[Branch]) -> dict[Branch, Tensor]:
        """Read the branches of each row one after another, all in one pass."""
        ids, positions, mask, last = self._layout(branches)
        # No logits are needed.
        options = {"position_ids": positions, "max_logits": 0}
        rows = [row[0].row for row in by_row(branches)]
        return self._run(rows, self.mask.shape[1], ids, mask, last, **options)

    def _one_by_one(self, branches: list[Branch]) -> dict[Branch, Tensor]:
        """Read branches of the same place and length together, in rows of their own."""
        length = self.mask.shape[1]
        vectors: dict[Branch, Tensor] = {}
        assert self._layers is not None, "there are plain keys and values"
        for group in alike(branches):
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
            ids, mask, positions, self.image_tokens, layers, cache=cache, use_cache=True, **options
        )
        return dict(zip(last, self.attached.embed_states(reading.states), strict=True))


@dataclass(frozen=True)
class JoinedBranches:
    """Branches that a step of `generate` reads together with its own id.

    Args:
        attached: the active adapter.
        extra: what the step is given.
        last: where the last id of each branch is in it.
    """

    attached: AttachedAdapter
    extra: ExtraIds
    last: Mapping[Branch, int]

    def vectors(self) -> dict[Branch, Tensor]:
        """Return the vectors (q,), on the CPU, once the step has been taken; none if it could not read them."""
        states = self.extra.states
        if states is None:
            return {}
        places = torch.tensor([*self.last.values()], device=states.device)
        vectors = self.attached.embed_states([states.index_select(0, places)])
        return dict(zip(self.last, vectors.cpu(), strict=True))
