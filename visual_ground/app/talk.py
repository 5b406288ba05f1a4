"""One person's conversation: what the model reads of it, and what the page shows of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visual_ground.app.asking import Asked, Question
from visual_ground.app.bubbles import Album, bubble
from visual_ground.errors import GroundingError
from visual_ground.generation.growing import joined
from visual_ground.generation.markdown import made_harmless
from visual_ground.generation.output import InterleavedOutput, Part
from visual_ground.generation.sentences import cut_to_sentences
from visual_ground.prompts.chat import typed_message
from visual_ground.server.engine import Engine
from visual_ground.server.failures import RequestFailure
from visual_ground.server.pictures import decode_picture, kept
from visual_ground.server.sampling import Sampling

# Seconds. Each time, a browser is sent and draws the whole answer: one that shows every token falls behind the model.
SHOWN_EVERY = 0.05

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Wishes:
    """How a person wants to be answered.

    Args:
        album: the pictures that may be shown, or None.
        adapter: the name of an adapter of the model.
        sampling: how tokens are chosen, and when pictures come.
        max_tokens: the most tokens of an answer.
        system: the system message; none where empty.
    """

    album: Album | None
    adapter: str
    sampling: Sampling
    max_tokens: int
    system: str = ""


@dataclass
class Turn:
    """A question and its answer.

    Attributes:
        text: what was asked.
        files: the pictures that were shown with it.
        album: where the answer's pictures are from.
        answer: its parts so far.
        failure: why there is no answer, in plain words.
        messages: what the model reads of it; nothing of a turn that failed.
    """

    text: str
    files: tuple[str, ...]
    album: Album | None
    answer: list[Part] = field(default_factory=list)
    failure: str | None = None
    messages: Messages = field(default_factory=list)

    def take(self, answer: Sequence[Part], question: dict[str, Any]) -> None:
        """Take the answer as it is by now."""
        self.answer = list(answer)
        self.messages = [question, *InterleavedOutput(joined(answer)).to_messages()]

    @property
    def shown(self) -> Messages:
        """The turn as messages of gradio's chatbot."""
        shown: Messages = [{"role": "user", "content": {"path": path}} for path in self.files]
        shown += [{"role": "user", "content": made_harmless(self.text)}] if self.text else []
        if self.failure is not None:
            return [*shown, {"role": "assistant", "content": made_harmless(self.failure)}]
        content = bubble(joined(self.answer), self.album)
        return [*shown, {"role": "assistant", "content": content}] if content else shown


class Talk:
    """A conversation, kept in the app's memory for one open page."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self._asked: Asked | None = None
        self._is_stopped = False

    def __deepcopy__(self, memo: Mapping[int, Any]) -> Talk:
        return Talk()  # gradio copies what every page starts with.

    @property
    def shown(self) -> Messages:
        """All turns as messages of gradio's chatbot."""
        return [message for turn in self.turns for message in turn.shown]

    def stop(self) -> None:
        """End the answer that is being generated; what has come of it stays."""
        self._is_stopped = True  # Also an answer that is only about to be asked for.
        if self._asked is not None:
            self._asked.cancel()

    def take_back(self) -> Turn | None:
        """Forget the last turn and return it."""
        self.stop()
        return self.turns.pop() if self.turns else None

    def say(self, text: str, files: Sequence[str], engine: Engine, wishes: Wishes) -> Iterator[None]:
        """Ask; come back when there is more of the answer, as often as a page can show it.

        What fails is told in plain words in the place of the answer, and the model does not read it afterwards.
        """
        turn = Turn(text.strip(), tuple(files), wishes.album)
        before = [message for past in self.turns for message in past.messages]
        system = [typed_message("system", [wishes.system.strip()])] if wishes.system.strip() else []
        self.turns.append(turn)
        self._is_stopped = False
        yield
        try:
            question = typed_message("user", [*map(read_picture, turn.files), *([turn.text] if turn.text else [])])
            asked = [*system, *before, question]
            index = None if wishes.album is None else wishes.album.index
            self._asked = Asked(engine, Question(asked, index, wishes.adapter, wishes.sampling, wishes.max_tokens))
            if self._is_stopped:
                self._asked.cancel()
            for parts in self._asked.parts():
                turn.take([*turn.answer, *parts], question)
                yield
                time.sleep(SHOWN_EVERY)
            if self._asked.is_cut:
                turn.take(cut_to_sentences(joined(turn.answer)), question)
        except RequestFailure as failure:
            turn.failure, turn.messages = failure.message, []
        except GroundingError as error:
            turn.failure, turn.messages = str(error), []
        yield


def read_picture(path: str) -> Any:
    """Return an uploaded picture, no larger than is needed; RequestFailure for none, or one with too many pixels."""
    try:
        picture = decode_picture(Path(path).read_bytes())
    except GroundingError as error:
        raise RequestFailure(400, f"The picture cannot be read: {error}") from error
    return kept(picture)
