"""Answers while they are generated: text as it grows, and each image at the moment its `[RET]` comes."""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature

from visual_ground.adapter.attached import AttachedAdapter
from visual_ground.errors import GroundingValueError
from visual_ground.generation.generate import check_index, generate_ids, with_padding
from visual_ground.generation.growing import GrowingAnswer, joined
from visual_ground.generation.listener import AnswerListener
from visual_ground.generation.options import ended_by_itself, option_of, silent_ids
from visual_ground.generation.output import InterleavedOutput, Part
from visual_ground.generation.retrieval_token import RetrievalSettings
from visual_ground.generation.seeing import SeenImages
from visual_ground.index.base import RetrievalIndex
from visual_ground.lm.frozen_lm import FrozenLM


def stream(
    frozen_lm: FrozenLM,
    attached: AttachedAdapter,
    batch: BatchFeature,
    index: RetrievalIndex | None,
    options: dict[str, Any],
) -> Iterator[Part]:
    """Answer one prompt piece by piece; see `GroundedModel.stream`.

    Raises:
        GroundingTypeError: an index that cannot be searched.
        GroundingValueError: an index that does not fit, several prompts, or beam search.
    """
    settings = RetrievalSettings.take_from(options)
    check_index(index, attached)
    prompts, per_prompt = len(batch["input_ids"]), option_of(frozen_lm, options, "num_return_sequences") or 1
    if (prompts, per_prompt) != (1, 1):
        raise GroundingValueError(
            f"stream gives one answer to one prompt, got {prompts} prompts with {per_prompt} answers each. Call "
            "generate for several; one interleaved prompt is a list within the list."
        )
    answer = GrowingAnswer(attached, index, settings, silent_ids(frozen_lm, attached))

    has_ended, is_whole = ended_by_itself(frozen_lm, attached, options), False

    def run(put: Callable[[Part], None], closed: threading.Event) -> None:
        nonlocal is_whole
        ids = generate_parts(
            frozen_lm, attached, batch, settings, options, [answer], lambda row, part: put(part), closed
        )
        is_whole = has_ended(ids[0, batch["input_ids"].shape[1] :].tolist())

    yield from from_thread(run)
    yield from answer.end(is_whole)


def from_thread(run: Callable[[Callable[[Part], None], threading.Event], None]) -> Iterator[Part]:
    """Run `run(put, closed)` in a thread and yield what it puts; `closed` is set when the caller stops reading."""
    events: queue.SimpleQueue[Part | BaseException | None] = queue.SimpleQueue()
    closed = threading.Event()

    @torch.no_grad()
    def work() -> None:
        try:
            run(events.put, closed)
            events.put(None)
        except BaseException as error:  # Raised again where the answer is read.
            events.put(error)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(work,), daemon=True)
    thread.start()
    try:
        while (event := events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event
    finally:
        closed.set()
        thread.join()


@torch.no_grad()
def generate_seeing(
    frozen_lm: FrozenLM,
    attached: AttachedAdapter,
    batch: BatchFeature,
    index: RetrievalIndex | None,
    settings: RetrievalSettings,
    options: Mapping[str, Any],
) -> list[InterleavedOutput]:
    """Answer a batch of prompts with `see_images`; the arguments and errors are those of `generate`."""
    check_index(index, attached)
    has_ended, silent = ended_by_itself(frozen_lm, attached, options), silent_ids(frozen_lm, attached)
    count = len(batch["input_ids"]) * (option_of(frozen_lm, options, "num_return_sequences") or 1)
    answers = [GrowingAnswer(attached, index, settings, silent) for _ in range(count)]
    parts: list[list[Part]] = [[] for _ in answers]

    def put(row: int, part: Part) -> None:
        parts[row].append(part)

    with frozen_lm.bind():  # As in `generate`.
        sequences = generate_parts(frozen_lm, attached, batch, settings, options, answers, put)
    rows = zip(parts, answers, sequences[:, batch["input_ids"].shape[1] :].tolist(), strict=True)
    return [InterleavedOutput(joined([*some, *one.end(has_ended(ids))])) for some, one, ids in rows]


def generate_parts(
    frozen_lm: FrozenLM,
    attached: AttachedAdapter,
    batch: BatchFeature,
    settings: RetrievalSettings,
    options: Mapping[str, Any],
    answers: Sequence[GrowingAnswer],
    put: Callable[[int, Part], None],
    closed: threading.Event | None = None,
) -> Tensor:
    """Run transformers' `generate`, put each part of each answer when it comes, and return the ids as `generate_ids`.

    Raises:
        GroundingValueError: beam search or speculative decoding, whose tokens may be taken back.
    """
    image_tokens, options = with_padding(attached, attached.prompt_tokens(batch.get("pixel_values")), options)
    seen = SeenImages(frozen_lm, attached, image_tokens) if settings.see_images else None

    def take(row: int, token: int, vector: Tensor | None) -> bool:
        parts = answers[row].add(token, vector)
        for part in parts:
            put(row, part)
        if seen is not None and vector is not None:
            seen.take(row, answers[row].latest)
        return closed is None or not closed.is_set()

    per_prompt = option_of(frozen_lm, options, "num_return_sequences") or 1
    listener = AnswerListener(frozen_lm, attached, batch["attention_mask"], take, per_prompt, seen)
    sequences = generate_ids(frozen_lm, attached, batch, image_tokens, settings, options, listener)
    if listener.lost:
        raise _beams()
    return sequences


def _beams() -> GroundingValueError:
    return GroundingValueError(
        "An answer can be streamed, and can see its images, where each token is final when it comes, not with beam "
        "search or speculative decoding. Leave out num_beams and the like, or call generate without see_images."
    )
