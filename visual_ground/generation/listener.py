"""Listening to transformers' `generate` while it runs: each token as it is said, each `[RET]` with its vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria

from visual_ground.adapter.attached import AttachedAdapter
from visual_ground.generation.running_cache import copy_of_running_cache
from visual_ground.generation.seeing import SeenImages
from visual_ground.lm.frozen_lm import FrozenLM
from visual_ground.scoring.query_vectors import mean_vector, opening_contexts

# Called with the sequence, the token and, where it is `[RET]`, its retrieval vector (q,); returns whether to go on.
OnToken = Callable[[int, int, Tensor | None], bool]
# Reads the vectors of finished sequences by running them once more; see `query_vectors.ret_vectors`.
ReadAgain = Callable[[Tensor, Tensor, int], Sequence[Tensor]]


# A row, and how many of its ids come before where it is read.
Place = tuple[int, int]


class AnswerListener(StoppingCriteria):
    """Follows a `generate` token by token, and reads the retrieval vector of each `[RET]` at the moment it is said.

    The state is read from a copy of the keys and values that `generate` holds, so what came before is not run again;
    an LM that holds something else is run once more up to the `[RET]`. For what is read besides at an answer's first
    `[RET]`, see `query_vectors.opening_contexts`.

    Args:
        frozen_lm: the LM.
        attached: the active adapter.
        mask: (b, s), of the prompts.
        read_again: for LMs without plain keys and values.
        on_token: as `OnToken` says; not called again for a sequence once it has returned False for it.
        per_prompt: how many answers each prompt gets. If `generate` follows more sequences, it is a beam search.
        seen: puts images into the context; its tokens are not heard.

    Attributes:
        lost: whether it cannot follow, because tokens were taken back or sequences swapped.
    """

    def __init__(
        self,
        frozen_lm: FrozenLM,
        attached: AttachedAdapter,
        mask: Tensor,
        read_again: ReadAgain,
        on_token: OnToken = lambda row, token, vector: True,
        per_prompt: int = 1,
        seen: SeenImages | None = None,
    ) -> None:
        self.frozen_lm, self.attached, self.mask, self.read_again = frozen_lm, attached, mask, read_again
        self.on_token, self.per_prompt, self.seen = on_token, per_prompt, seen
        self.start = mask.shape[1]
        self._heard: Tensor | None = None  # What had been said at the latest step.
        self._ended: set[int] = set()
        self._vectors: dict[tuple[int, int], Tensor] = {}
        self.lost = False

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Any = None, **options: Any) -> Tensor:
        """Hear the newest tokens of ids (b, s); return which sequences are to end, (b,) bool."""
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
            self.seen.write(input_ids)  # In place: what `generate` goes on with.
        ended = [row in self._ended for row in range(len(input_ids))]
        return torch.tensor(ended, device=input_ids.device)

    def _check_order(self, ids: Tensor) -> None:
        before = self._heard
        if before is None:
            self.lost = ids.shape != (len(self.mask) * self.per_prompt, self.start + 1)
        elif not self.lost:
            self.lost = before.shape != ids[:, :-1].shape or not torch.equal(before, ids[:, :-1])
        self._heard = ids

    def _read(self, ids: Tensor) -> dict[int, Tensor]:
        """Return the vectors of the sequences that have just said `[RET]`, by row."""
        said = ids[:, -1] == self.attached.processor.ret_token_id
        rows = [row for row in said.nonzero()[:, 0].tolist() if row not in self._ended]
        if not rows:
            return {}
        end = ids.shape[1] - 1
        asked = {row: self._openings(row, ids) for row in rows}
        first = [row for row in rows if asked[row]]
        read = self._read_behind([*((row, end) for row in rows), *((row, self.start) for row in first)], ids)
        found = {row: read[row, end] for row in rows}
        for row in first:
            found[row] = mean_vector([found[row], read[row, self.start], *map(self._read_alone, asked[row][1:])])
        self._vectors |= {(row, end): vector for row, vector in found.items()}
        return found

    def _openings(self, row: int, ids: Tensor) -> list[Sequence[int]]:
        """Return the contexts that are read besides, if this is a row's first `[RET]`."""
        if any(known == row for known, _ in self._vectors):
            return []
        prompt = ids[row, : self.start][self._mask_of(row).bool().to(ids.device)]
        return opening_contexts(self.attached, prompt.tolist(), ids[row, self.start : -1].tolist())

    def _read_alone(self, context: Sequence[int]) -> Tensor:
        """Return the vector (q,), on the CPU, read behind ids of which nothing is kept."""
        sequence = torch.tensor([[*context, self.attached.processor.ret_token_id]], device=self.frozen_lm.device)
        return self.read_again(sequence, torch.ones_like(sequence[:, :-1]), len(context))[0][0].cpu()

    def _read_behind(self, places: Sequence[Place], ids: Tensor) -> dict[Place, Tensor]:
        """Return the vectors (q,), on the CPU, read behind so many of the ids of some rows of ids (b, s)."""
        groups: dict[Any, list[Place]] = {}
        suffixes = {(row, count): self._suffix(ids[row, :count]) for row, count in places}
        for row, count in places:
            # Rows of different lengths can be run together where an LM knows positions apart from padding.
            width = 0 if self.frozen_lm.takes_positions else count
            groups.setdefault((len(suffixes[row, count]), width), []).append((row, count))
        found: dict[Place, Tensor] = {}
        for group in groups.values():
            vectors = self._read_on_copy(group, torch.tensor([suffixes[place] for place in group], device=ids.device))
            if vectors is None:
                vectors = torch.cat([self._read_anew(row, ids[row : row + 1, :count]) for row, count in group])
            found |= dict(zip(group, vectors.cpu(), strict=True))
        return found

    def _suffix(self, said: Tensor) -> list[int]:
        return self.attached.processor.retrieval_suffix(said.tolist())

    def _mask_of(self, row: int) -> Tensor:
        return self.mask[row // self.per_prompt]

    def _read_anew(self, row: int, said: Tensor) -> Tensor:
        """Return the vector (1, q) read behind said (1, s), of this row."""
        ret = torch.full_like(said[:, :1], self.attached.processor.ret_token_id)
        mask = nn.functional.pad(self._mask_of(row)[None], (0, said.shape[1] - self.start), value=1)
        return torch.cat([*self.read_again(torch.cat([said, ret], 1), mask, said.shape[1])])

    def _read_on_copy(self, places: Sequence[Place], suffixes: Tensor) -> Tensor | None:
        """Run retrieval suffixes (r, n) on a copy of the cache; return vectors (r, q), or None if that cannot be done.

        Rows that are read at an earlier position are moved to the right, as prompts are that are padded on the left.
        """
        assert self._heard is not None, "it has heard the ids that it reads behind"
        length = self._heard.shape[1] - 1
        longest = self.frozen_lm.max_length
        if longest is not None and length + suffixes.shape[1] > longest:
            return None
        cache = copy_of_running_cache(self.frozen_lm, length, places)
        if cache is None:
            return None
        kept = max(count for _, count in places)
        mask = torch.ones(len(places), kept + suffixes.shape[1], dtype=self.mask.dtype, device=suffixes.device)
        for padded, (row, count) in zip(mask, places, strict=True):
            padded[: kept - count] = 0
            padded[kept - count : kept - count + self.start] = self._mask_of(row)
        last = torch.arange(1, len(suffixes) + 1, device=suffixes.device) * suffixes.shape[1] - 1
        layers = self.attached.config.text_layers
        states = self.frozen_lm.hidden_states(suffixes, mask, last, layers, cache=cache, use_cache=True)
        return self.attached.embed_states(states)

    def vectors_of(self, sequences: Tensor) -> list[Tensor] | None:
        """Return the vectors (r, q) of each finished sequence (b, s), or None if the listener heard other ids."""
        heard = self._heard
        if self.lost or heard is None or heard.shape != sequences.shape or not torch.equal(heard, sequences):
            return None
        found: list[list[Tensor]] = [[] for _ in sequences]
        for (row, _), vector in self._vectors.items():
            found[row].append(vector)
        empty = torch.empty(0, self.attached.config.retrieval_dim)
        return [torch.stack(vectors) if vectors else empty for vectors in found]
