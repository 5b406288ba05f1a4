"""Listening to transformers' `generate` while it runs: each token as it is generated, each `[RET]` with its vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria

from visual_ground.adapter.attached import AttachedAdapter
from visual_ground.generation.branches import BranchReader, branch_of
from visual_ground.generation.seeing import SeenImages
from visual_ground.lm.frozen_lm import FrozenLM
from visual_ground.lm.hook_context import context_of
from visual_ground.scoring.query_vectors import mean_vector, opening_contexts, vectors_after

# Called with the sequence, the token and, if it is `[RET]`, its retrieval vector (q,); returns whether to continue.
OnToken = Callable[[int, int, Tensor | None], bool]


class AnswerListener(StoppingCriteria):
    """Follows a `generate` token by token, and reads the retrieval vector of each `[RET]` at the moment it comes.

    The state is read from a copy of the keys and values that `generate` holds, so what came before is not run again;
    an LM that holds something else is run once more up to the `[RET]`. For what is also read at an answer's first
    `[RET]`, see `query_vectors.opening_contexts`.

    Args:
        frozen_lm: the LM.
        attached: the active adapter.
        mask: (b, s), of the prompts.
        on_token: as `OnToken` says; not called again for a sequence once it has returned False for it.
        per_prompt: how many answers each prompt gets. If `generate` follows more sequences, it is a beam search.
        seen: puts images into the context; `on_token` is not called for its tokens.

    Attributes:
        lost: whether it cannot follow, because tokens were taken back or sequences swapped.
    """

    def __init__(
        self,
        frozen_lm: FrozenLM,
        attached: AttachedAdapter,
        mask: Tensor,
        on_token: OnToken = lambda row, token, vector: True,
        per_prompt: int = 1,
        seen: SeenImages | None = None,
    ) -> None:
        self.frozen_lm, self.attached, self.mask = frozen_lm, attached, mask
        self.on_token, self.per_prompt, self.seen = on_token, per_prompt, seen
        self.start = mask.shape[1]
        self._ids: Tensor | None = None  # As they were at the latest step.
        self._ended: set[int] = set()
        self._vectors: dict[tuple[int, int], Tensor] = {}
        self.lost = False

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Any = None, **options: Any) -> Tensor:
        """Take the newest tokens of ids (b, s); return which sequences are to end, (b,) bool."""
        self._check_order(input_ids)
        if self.lost:  # Beams swap sequences and speculation takes back tokens; then there is nothing to follow.
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        vectors = self._read(input_ids)
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if row in self._ended or (self.seen is not None and self.seen.passes(row, token)):
                continue
            if not self.on_token(row, token, vectors.get(row)):
                self._ended.add(row)
        if self.seen is not None:
            self.seen.write(input_ids)  # In place, because `generate` continues with this tensor.
        ended = [row in self._ended for row in range(len(input_ids))]
        return torch.tensor(ended, device=input_ids.device)

    def _check_order(self, ids: Tensor) -> None:
        before = self._ids
        if before is None:
            self.lost = ids.shape != (len(self.mask) * self.per_prompt, self.start + 1)
        elif not self.lost:
            self.lost = before.shape != ids[:, :-1].shape or not torch.equal(before, ids[:, :-1])
        self._ids = ids

    def _read(self, ids: Tensor) -> dict[int, Tensor]:
        """Return the vectors of the sequences whose newest token is `[RET]`, by row."""
        shows = ids[:, -1] == self.attached.processor.ret_token_id
        rows = [row for row in shows.nonzero()[:, 0].tolist() if row not in self._ended]
        if not rows:
            return {}
        mask = self.mask.repeat_interleave(self.per_prompt, 0).to(ids.device)
        mask = nn.functional.pad(mask, (0, ids.shape[1] - 1 - self.start), value=1)
        sequences = {row: ids[row, :-1][mask[row].bool()].tolist() for row in rows}
        contexts = {row: [sequence, *self._openings(row, sequence)] for row, sequence in sequences.items()}
        read = iter(self._read_after([(row, ids) for row in rows for ids in contexts[row]], sequences, mask))
        found = {row: mean_vector([next(read) for _ in contexts[row]]) for row in rows}
        self._vectors |= {(row, ids.shape[1] - 1): vector for row, vector in found.items()}
        return found

    def _openings(self, row: int, sequence: list[int]) -> list[Sequence[int]]:
        """Return the contexts that are also read, if this is a row's first `[RET]`."""
        if any(known == row for known, _ in self._vectors):
            return []
        count = int(self.mask[row // self.per_prompt].sum())
        return opening_contexts(self.attached, sequence[:count], sequence[count:])

    def _read_after(
        self, contexts: Sequence[tuple[int, Sequence[int]]], sequences: Mapping[int, list[int]], mask: Tensor
    ) -> list[Tensor]:
        """Return the vectors (q,), on the CPU, read after each context.

        Args:
            contexts: (row, ids) of each.
            sequences: the ids of each row, without padding.
            mask: (b, s), of all positions that were run.
        """
        suffix, length = self.attached.processor.retrieval_suffix, mask.shape[1]
        branches = [
            branch_of(row, length - len(sequences[row]), sequences[row], [*context, *suffix(context)])
            for row, context in contexts
        ]
        found = BranchReader(self.frozen_lm, self.attached, mask).read(branches)
        if anew := [context for (_, context), one in zip(contexts, branches, strict=True) if one not in found]:
            running = context_of(self.frozen_lm.virtual_tokens)
            image_tokens = None if running is None else running.image_tokens
            again = iter(vectors_after(self.frozen_lm, self.attached, anew, image_tokens))
            return [found[one] if one in found else next(again) for one in branches]
        return [found[one] for one in branches]

    def vectors_of(self, sequences: Tensor) -> list[Tensor] | None:
        """Return the vectors (r, q) of each finished sequence (b, s), or None if it followed other ids."""
        ids = self._ids
        if self.lost or ids is None or ids.shape != sequences.shape or not torch.equal(ids, sequences):
            return None
        found: list[list[Tensor]] = [[] for _ in sequences]
        for (row, _), vector in self._vectors.items():
            found[row].append(vector)
        empty = torch.empty(0, self.attached.config.retrieval_dim)
        return [torch.stack(vectors) if vectors else empty for vectors in found]
