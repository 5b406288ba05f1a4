"""One question of the page, put to the server's engine, and its answer piece by piece."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from visual_ground.generation.growing import GrowingAnswer
from visual_ground.generation.options import silent_ids
from visual_ground.generation.output import Part
from visual_ground.server.chats import encode
from visual_ground.server.engine import Engine
from visual_ground.server.failures import RequestFailure
from visual_ground.server.jobs import Finished, Job
from visual_ground.server.pictures import ShownIndex
from visual_ground.server.requests import ChatRequest
from visual_ground.server.sampling import Sampling


@dataclass(frozen=True)
class Question:
    """What is asked, and how it is to be answered.

    Args:
        messages: the conversation so far, with this question as the last message.
        index: the pictures that may be shown, or None.
        adapter: the name of an adapter of the model.
        sampling: how tokens are chosen, and when pictures come.
        max_tokens: the most tokens of the answer.
    """

    messages: list[dict[str, Any]]
    index: ShownIndex | None
    adapter: str
    sampling: Sampling
    max_tokens: int


class Asked:
    """A question that the engine answers.

    Args:
        engine: what generates.
        question: what is asked.

    Attributes:
        is_cut: whether the answer ran out of tokens.

    Raises:
        RequestFailure: a conversation that does not fit into the context, or a full queue.
    """

    def __init__(self, engine: Engine, question: Question) -> None:
        attached, retrieval = engine.model.adapters[question.adapter], question.sampling.retrieval
        silent = silent_ids(engine.model.frozen_lm, attached)
        request = ChatRequest(question.messages, [question.sampling], question.max_tokens, (), True, False)
        self.is_cut = False
        self._events: queue.SimpleQueue[Part | Finished] = queue.SimpleQueue()
        with engine.expecting():
            self._job = Job(
                encode(engine, request, attached),
                question.sampling,
                question.max_tokens,
                GrowingAnswer(attached, question.index, retrieval, silent),
                self._events.put,
                time.monotonic() + engine.limits.timeout,
                question.adapter,
            )
            engine.submit([self._job])

    def cancel(self) -> None:
        """End the answer with the token that it is at."""
        self._job.cancel()

    def parts(self) -> Iterator[list[Part]]:
        """Yield all parts of the answer that have come since the last time; whoever leaves early ends it."""
        end: Finished | None = None
        try:
            while end is None:
                parts, end = self._come_by_now()
                if parts:
                    yield parts
            self.is_cut = end.reason == "length"
            if end.reason == "timeout":
                raise RequestFailure(504, "The answer took too long and was stopped.")
            if end.reason == "error":
                raise RequestFailure(500, "The answer failed; the log of the app says why.")
        finally:
            self.cancel()

    def _come_by_now(self) -> tuple[list[Part], Finished | None]:
        """Wait until there is something; return all parts that wait to be shown, and the end where it has come."""
        parts: list[Part] = []
        event = self._events.get()
        while not isinstance(event, Finished):
            parts.append(event)
            if self._events.empty():  # Nobody else takes from it.
                return parts, None
            event = self._events.get()
        return parts, event
