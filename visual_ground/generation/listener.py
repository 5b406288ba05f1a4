"""Listening to transformers' `generate` while it runs: each token as it is generated, each `[RET]` with its vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria

from visual_ground.adapter.attached import AttachedAdapter
from visual_ground.generation.branches import BranchReader, JoinedBranches
from visual_ground.generation.layout import Branch, branch_of
from visual_ground.generation.seeing import SeenImages
from visual_ground.lm.frozen_lm import FrozenLM
from visual_ground.scoring.query_vectors import mean_vector, opening_contexts, vectors_after

# Called with the row of the sequence, the token and, if it is `[RET]`, its retrieval vector (q,); returns whether to
# continue. A `[RET]` may be reported one step late, just before the token after it.
OnToken = Callable[[int, int, Tensor | None], bool]


@dataclass(frozen=True)
class _Waiting:
    """A `[RET]` whose vector the next step of `generate` reads."""

    row: int
    place: int
    contexts: Sequence[Sequence[int]]
    branches: Sequence[Branch]
    reader: BranchReader
    joined: JoinedBranches


class AnswerListener(StoppingCriteria):
    """Follows a `generate` token by token, and reads the retrieval vector of each `[RET]` as it comes.

    The state is read beside the keys and values that `generate` holds, so what came before is not run again; an LM that
    holds something else is run once more up to the `[RET]`. For what is also read at an answer's first `[RET]`, see
    `query_vectors.opening_contexts`. If `BranchReader.join` allows it, the step that follows the `[RET]` reads all of
    this, because a forward of its own would take about as long as that step.

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
        self._waiting: _Waiting | None = None
        self.lost = False

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Any = None, **options: Any) -> Tensor:
        """Take the newest tokens of ids (b, s); return which sequences are to end, (b,) bool."""
        self._check_order(input_ids)
        if self.lost:  # Beams swap sequences and speculation takes back tokens; then there is nothing to follow.
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        mask = self.mask.repeat_interleave(self.per_prompt, 0).to(input_ids.device)
        mask = nn.functional.pad(mask, (0, input_ids.shape[1] - 1 - self.start), value=1)
        reader = BranchReader(self.frozen_lm, self.attached, mask)
        self._tell_waiting(reader)
        vectors = self._read(input_ids, reader)
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if row in self._ended or self._waiting is not None or (self.seen and self.seen.consume(row, token)):
                continue
            if not self.on_token(row, token, vectors.get(row)):
                self._ended.add(row)
        if self.seen is not None:
            self.seen.write(input_ids)  # In place, because `generate` continues with this tensor.
        ended = [row in self._ended for row in range(len(input_ids))]
        return torch.tensor(ended, device=input_ids.device)

    @torch.no_grad()
    def finish(self) -> None:
        """Report a `[RET]` that was the last token, which no step followed; called when `generate` has ended."""
        if not self.lost and self._waiting is not None:
            self._tell_waiting(self._waiting.reader)

    def _check_order(self, ids: Tensor) -> None:
        before = self._ids
        if before is None:
            self.lost = ids.shape != (len(self.mask) * self.per_prompt, self.start + 1)
        elif not self.lost:
            self.lost = before.shape != ids[:, :-1].shape or not torch.equal(before, ids[:, :-1])
        self._ids = ids

    def _read(self, ids: Tensor, reader: BranchReader) -> dict[int, Tensor]:
        """Return the vectors of the sequences whose newest token is `[RET]`, by row; or let the next step read them."""
        shows = ids[:, -1] == self.attached.processor.ret_token_id
        rows = [row for row in shows.nonzero()[:, 0].tolist() if row not in self._ended]
        contexts: dict[int, list[Sequence[int]]] = {}
        branches: dict[int, list[Branch]] = {}
        suffix = self.attached.processor.retrieval_suffix
        for row in rows:
            sequence = ids[row, :-1][reader.mask[row].bool()].tolist()
            padding = reader.mask.shape[1] - len(sequence)
            contexts[row] = [sequence, *self._openings(row, sequence)]
            branches[row] = [branch_of(row, padding, sequence, [*some, *suffix(some)]) for some in contexts[row]]
        place = ids.shape[1] - 1
        if rows == [0] and self.seen is None and (joined := reader.join(branches[0], int(ids[0, -1]))) is not None:
            self._waiting = _Waiting(0, place, contexts[0], branches[0], reader, joined)
            return {}
        read = reader.read([branch for row in rows for branch in branches[row]]) if rows else {}
        found = {row: self._mean(contexts[row], branches[row], read, reader) for row in rows}
        self._vectors |= {(row, place): vector for row, vector in found.items()}
        return found

    def _openings(self, row: int, sequence: list[int]) -> list[Sequence[int]]:
        """Return the contexts that are also read, if this is a row's first `[RET]`."""
        if any(known == row for known, _ in self._vectors):
            return []
        count = int(self.mask[row // self.per_prompt].sum())
        return opening_contexts(self.attached, sequence[:count], sequence[count:])

    def _mean(
        self,
        contexts: Sequence[Sequence[int]],
        branches: Sequence[Branch],
        read: Mapping[Branch, Tensor],
        reader: BranchReader,
    ) -> Tensor:
        """Return the mean direction (q,), on the CPU, of the vectors of branches; what was not read is run anew."""
        anew = [context for context, one in zip(contexts, branches, strict=True) if one not in read]
        again = iter(vectors_after(self.frozen_lm, self.attached, anew, reader.image_tokens) if anew else ())
        return mean_vector([read[one] if one in read else next(again) for one in branches])

    def _tell_waiting(self, reader: BranchReader) -> None:
        """Report the `[RET]` that was waiting for this step; if the step could not read its vector, read it now."""
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return
        read = waiting.joined.vectors() or reader.read(waiting.branches)
        vector = self._mean(waiting.contexts, waiting.branches, read, reader)
        self._vectors[waiting.row, waiting.place] = vector
        if not self.on_token(waiting.row, self.attached.processor.ret_token_id, vector):
            self._ended.add(waiting.row)

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
