"""Greedy answers of the frozen LM, in batches, with what its output head read for each of their tokens.

Reading many answers again would take as long as generating them, and so would reading anew in each prompt what all
begin with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import BatchFeature, LogitsProcessor

from visual_ground.generation.generate import generate_ids
from visual_ground.generation.options import end_ids
from visual_ground.generation.retrieval_token import RetrievalSettings
from visual_ground.lm.frozen_lm import FrozenLM
from visual_ground.lm.key_values import copy_of
from visual_ground.model import GroundedModel
from visual_ground.prompts.encoded import EncodedPrompt, pad_batch
from visual_ground.training.speedups.beginnings import read_beginnings

# Tokens after which answers that are long enough leave the batch, as the others need not wait for them.
ROUND = 4


@dataclass(frozen=True)
class Answer:
    """What the LM answers by itself.

    Args:
        prompt: the ids before the answer, as in `EncodedPrompt`.
        ids: the answer's, without the one that ends it.
        ended: whether the LM ended it; else it ran out of tokens, or was long enough.
        wanted: whether a picture was asked for.
        image_tokens: (k, d), of each picture in the prompt.
        states: (n, h), what the output head read at each of the n places at which `[RET]` could have come.
        log_normaliser: (n,), of the LM's own columns there.
    """

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    ended: bool
    wanted: bool
    image_tokens: Sequence[Tensor] = field(default=(), compare=False)
    states: Tensor = field(default_factory=lambda: torch.empty(0, 0), compare=False)
    log_normaliser: Tensor = field(default_factory=lambda: torch.empty(0), compare=False)

    @property
    def num_places(self) -> int:
        """At how many places `[RET]` could have come: before each id, and before the end."""
        return len(self.ids) + self.ended

    def cut(self, count: int) -> Answer:
        """Return it with its first ids only, at most so many."""
        if count >= len(self.ids):
            return self
        states, log_normaliser = self.states[:count], self.log_normaliser[:count]
        return replace(self, ids=self.ids[:count], ended=False, states=states, log_normaliser=log_normaliser)

    def longer(self, new: Sequence[int], stops: set[int], states: Tensor, log_normaliser: Tensor) -> Answer:
        """Return it with m new ids, up to the one that ends it, and what was read (m, h) and (m,) for them."""
        end = next((i for i, token in enumerate(new) if token in stops), None)
        count = len(new) if end is None else end + 1
        states = torch.cat([self.states.view(-1, states.shape[1]), states[:count]])
        log_normaliser = torch.cat([self.log_normaliser, log_normaliser[:count]])
        ids, ended = (*self.ids, *new[:end]), end is not None
        return replace(self, ids=ids, ended=ended, states=states, log_normaliser=log_normaliser)


class HeadRecorder(LogitsProcessor):
    """Keeps what the output head reads in each step of a running `generate`.

    Args:
        frozen_lm: the LM.

    Attributes:
        states: of each step, (b, h).
        log_normalisers: of each step, (b,).
        cache: what the LM kept of the latest step.
    """

    def __init__(self, frozen_lm: FrozenLM) -> None:
        self.frozen_lm = frozen_lm
        self.cache: Any = None
        self.states, self.log_normalisers = list[Tensor](), list[Tensor]()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Take the scores (b, columns) of a step, in which `[RET]` is forbidden, and leave them as they are."""
        context = self.frozen_lm.virtual_tokens.context
        assert context is not None and context.head_input is not None, "the head ran"
        self.states.append(context.head_input[:, -1].float().cpu())
        self.log_normalisers.append(scores.float().logsumexp(-1).cpu())
        self.cache = context.cache
        return scores

    def read(self) -> tuple[Tensor, Tensor]:
        """Return the states (b, n, h) and the log normalisers (b, n) of n steps."""
        return torch.stack(self.states, 1), torch.stack(self.log_normalisers, 1)


@torch.no_grad()
def greedy_answers(
    model: GroundedModel,
    starts: Sequence[Answer],
    max_new_tokens: int,
    enough: Callable[[Answer], int | None] = lambda answer: None,
) -> list[Answer]:
    """Let the LM answer a batch of prompts, without `[RET]`.

    Args:
        model: the grounded model.
        starts: answers that have no ids yet.
        max_new_tokens: the most ids of an answer, and the one that ends it.
        enough: returns how many ids of an answer are enough, or None if it cannot be told yet.
    """
    frozen_lm, prompts = model.frozen_lm, [answer.prompt for answer in starts]
    ids, mask = padded(model, prompts, "left")
    seen = list(chain(*(answer.image_tokens for answer in starts)))
    image_tokens = torch.cat(seen) if seen else None
    stops, cache = end_ids(frozen_lm, model.active), read_beginnings(model, prompts, ids, mask, image_tokens)
    # Without a copy of the cache, answers cannot go on from where they were.
    step = max_new_tokens if cache is None else ROUND
    answers, going = list(starts), list(range(len(starts)))
    for done in range(0, max_new_tokens, step):
        recorder, width = HeadRecorder(frozen_lm), ids.shape[1]
        ids = _continued(model, ids, mask, image_tokens, cache, min(step, max_new_tokens - done), recorder)
        kept = []
        for i, (row, new, *read) in enumerate(zip(going, ids[:, width:].tolist(), *recorder.read(), strict=True)):
            answer = answers[row].longer(new, stops, *read)
            count = enough(answer)
            answers[row] = answer if count is None else answer.cut(count)
            if not answer.ended and (count is None or count > len(answer.ids)):
                kept.append(i)
        if not kept or step == max_new_tokens:
            break
        mask = nn.functional.pad(mask, (0, ids.shape[1] - width), value=1)[kept]
        ids, going, cache = ids[kept], [going[i] for i in kept], copy_of(recorder.cache, _rows(kept))
    return answers


def _continued(
    model: GroundedModel,
    ids: Tensor,
    mask: Tensor,
    image_tokens: Tensor | None,
    cache: Any,
    max_new_tokens: int,
    recorder: HeadRecorder,
) -> Tensor:
    """Return ids (b, s) with the next ones behind them."""
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "logits_processor": [recorder]}
    options |= {} if cache is None else {model.frozen_lm.cache_name: cache}
    batch = BatchFeature({"input_ids": ids, "attention_mask": mask})
    return generate_ids(model.frozen_lm, model.active, batch, image_tokens, RetrievalSettings(max_images=0), options)


def _rows(kept: Sequence[int]) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor[kept]


def padded(
    model: GroundedModel, prompts: Sequence[tuple[int, ...]], side: Literal["left", "right"]
) -> tuple[Tensor, Tensor]:
    """Return the ids (b, s) of prompts, padded on one side, and their mask."""
    vocabulary, pad_id = model.frozen_lm.vocabulary, model.processor.pad_token_id
    ids, mask = pad_batch([EncodedPrompt(prompt, ()) for prompt in prompts], vocabulary.first_image_id, pad_id, side)
    return ids.to(model.frozen_lm.device), mask.to(model.frozen_lm.device)
