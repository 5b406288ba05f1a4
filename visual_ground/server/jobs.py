"""One answer that is waited for: its prompt, its settings, and what becomes of its tokens."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from visual_ground.generation.growing import GrowingAnswer
from visual_ground.generation.output import Part
from visual_ground.prompts.encoded import EncodedPrompt
from visual_ground.server.sampling import Sampling


@dataclass(frozen=True)
class Finished:
    """The end of an answer.

    Args:
        reason: "stop", "length", "timeout", "cancelled" or "error".
        tokens: how many were generated.
    """

    reason: str
    tokens: int


@dataclass
class Job:
    """One answer.

    Args:
        prompt: the ids and images.
        sampling: how tokens are chosen.
        max_tokens: the most that are generated.
        answer: turns tokens into texts and images, up to a stop.
        emit: takes each part, and `Finished` at the end; called in the engine's thread.
        deadline: of `time.monotonic`.
        adapter: the name of the adapter that answers; the active one if None.
    """

    prompt: EncodedPrompt
    sampling: Sampling
    max_tokens: int
    answer: GrowingAnswer
    emit: Callable[[Part | Finished], None]
    deadline: float
    adapter: str | None = None
    tokens: int = 0
    finished: bool = False
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Let the answer end with the token that it is at; called when nobody waits for it any more."""
        self._cancelled.set()

    @property
    def is_wanted(self) -> bool:
        """Whether somebody still waits for it, in time."""
        return not self._cancelled.is_set() and time.monotonic() < self.deadline

    def take(self, token: int, vector: Tensor | None, is_end: bool) -> bool:
        """Take a token; return whether the answer continues."""
        if not self.is_wanted:
            return self.drop()
        self.tokens += 1
        if is_end:
            return self._end("stop")
        for part in self.answer.add(token, vector):
            self.emit(part)
        if self.answer.stopped:
            return self._end("stop")
        return True if self.tokens < self.max_tokens else self._end("length")

    def _end(self, reason: str) -> bool:
        """Send what was held back, and end."""
        for part in self.answer.end(is_whole=reason == "stop"):
            self.emit(part)
        return self.finish("stop" if self.answer.stopped else reason)

    def drop(self) -> bool:
        """End an answer that is not wanted any more; return False."""
        return self.finish("cancelled" if self._cancelled.is_set() else "timeout")

    def finish(self, reason: str) -> bool:
        """End the answer, once; return False."""
        if not self.finished:
            self.finished = True
            self.emit(Finished(reason, self.tokens))
        return False
