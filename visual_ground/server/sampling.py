"""How each answer of a batch is sampled by its own settings, as if it were alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor

from visual_ground.generation.retrieval_token import RetLogitsProcessor, RetrievalSettings


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one answer are chosen.

    Args:
        temperature: 0 takes the likeliest.
        top_p: only the likeliest tokens of so much probability together.
        seed: None for another answer each time.
        retrieval: when `[RET]` may come.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    retrieval: RetrievalSettings = RetrievalSettings()


class RowSampling(LogitsProcessor):
    """Chooses the next token of each sequence by its own settings and random numbers.

    Every other token gets -inf, so that greedy decoding takes the one that was chosen.

    Args:
        ret_token_id: the id of `[RET]`.
        prompt_length: ids before the first generated one.
        rows: the settings of each sequence.
        places, decode: as in `RetLogitsProcessor`.
    """

    def __init__(
        self,
        ret_token_id: int,
        prompt_length: int,
        rows: Sequence[Sampling],
        places: Collection[int] = (),
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        self.rows = rows
        self._ret = [RetLogitsProcessor(ret_token_id, prompt_length, row.retrieval, places, decode) for row in rows]
        self._generators = [torch.Generator() for _ in rows]
        for generator, row in zip(self._generators, rows, strict=True):
            if row.seed is None:
                generator.seed()
            else:
                generator.manual_seed(row.seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (b, v + 1) in which each row's token is the largest."""
        rows = [self._choose(i, input_ids[i : i + 1], scores[i : i + 1]) for i in range(len(self.rows))]
        return torch.cat(rows)

    def _choose(self, row: int, ids: Tensor, scores: Tensor) -> Tensor:
        sampling = self.rows[row]
        scores = self._ret[row](ids, scores)
        if sampling.temperature == 0:
            return scores
        # On the CPU, where a seed gives the same numbers whatever the device, and with a single one for each token: how
        # many columns there are depends on the pictures of other rows.
        probabilities = torch.softmax(scores[0].double().cpu() / sampling.temperature, -1)
        if sampling.top_p < 1:
            ordered, order = probabilities.sort(descending=True)
            likely = ordered.cumsum(0) - ordered < sampling.top_p
            likely[0] = True
            probabilities = torch.zeros_like(probabilities).index_copy_(0, order, ordered * likely)
        # In the order of ids: rounding, which a batch changes, would swap equally likely tokens in any other.
        below = probabilities.cumsum(0)
        drawn = torch.rand(1, generator=self._generators[row], dtype=below.dtype) * below[-1]
        chosen = torch.searchsorted(below, drawn, right=True)
        last = torch.searchsorted(below, below[-1:])  # Rounding may draw the sum itself.
        chosen = torch.minimum(chosen, last).to(scores.device)
        return torch.full_like(scores, float("-inf")).index_fill_(1, chosen, 0.0)
