"""A conversation in a terminal: what was said and shown on both sides, and how a line is read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from visual_ground.errors import GroundingValueError
from visual_ground.generation.generate import check_index
from visual_ground.generation.growing import joined
from visual_ground.generation.output import InterleavedOutput, Part, RetrievedImage
from visual_ground.index.base import RetrievalIndex
from visual_ground.model import GroundedModel
from visual_ground.prompts.chat import chat_message
from visual_ground.prompts.types import is_image_file
from visual_ground.storage.atomic import replacing

# A word, a quoted path, or a path whose spaces have backslashes, as terminals write files that are dropped on them.
_WORD = re.compile(r"\"[^\"]+\"|'[^']+'|(?:\\.|\S)+")


class Conversation:
    """What was said and shown, and the model that answers.

    Args:
        model: the grounded model.
        index: the images that it can show, or None.
        options: for `GroundedModel.stream`.

    Attributes:
        turns: who said what, "user" or "assistant", with the images of both.

    Raises:
        GroundingValueError: an index that does not fit the model.
    """

    def __init__(self, model: GroundedModel, index: RetrievalIndex | None, options: Mapping[str, Any]) -> None:
        check_index(index, model.active)
        self.model, self.index, self.options = model, index, dict(options)
        self.turns: list[tuple[str, InterleavedOutput]] = []
        self._messages: list[dict[str, Any]] = []
        self._waiting: list[str] = []

    def reset(self) -> None:
        """Forget everything."""
        self.turns, self._messages, self._waiting = [], [], []

    def show(self, path: str) -> None:
        """Keep an image for the next line; raise GroundingValueError where it is no image file."""
        if not is_image_file(path):
            raise GroundingValueError(f"{path!r} is not an image file. Give the path of a PNG, JPEG, GIF or WebP file.")
        self._waiting.append(path)

    def answer(self, line: str) -> Iterator[Part]:
        """Yield the parts of the answer when they come; what came before an error or a stop is kept or not.

        An answer that is stopped by the reader stays as far as it went; after an error the line is forgotten.
        """
        parts = [*self._waiting, *split_line(line)]
        question = chat_message("user", parts)
        # An LM without a chat template answers each line by itself.
        prompt: Any = [*self._messages, question] if self.model.tokenizer.chat_template else [parts]
        answered: list[Part] = []
        try:
            for part in self.model.stream(prompt, self.index, **self.options):
                answered.append(part)
                yield part
        except Exception:
            answered = []
            raise
        finally:
            if answered:
                answer = InterleavedOutput(joined(answered))
                self._messages += [question, *answer.to_messages()]
                shown = (RetrievedImage(part, None, part) if is_image_file(part) else part for part in parts)
                self.turns += [("user", InterleavedOutput(tuple(shown))), ("assistant", answer)]
                self._waiting = []

    def save(self, path: str) -> None:
        """Write the conversation, whole or not at all; GroundingValueError for an unknown ending or nothing said."""
        writers = {".html": self._html, ".md": self._markdown, ".json": self._json}
        write = writers.get(Path(path).suffix.lower())
        if write is None:
            raise GroundingValueError(f"{path!r} must end in one of {', '.join(writers)}, which says the format.")
        if not self.turns:
            raise GroundingValueError("Nothing has been said yet, so there is nothing to save.")
        with replacing(Path(path)) as temporary:
            temporary.write_text(write(), encoding="utf-8")

    def _html(self) -> str:
        turns = "".join(f"<h4>{who}</h4>{output._repr_html_()}" for who, output in self.turns)
        return f'<!doctype html><html><head><meta charset="utf-8"></head><body>{turns}</body></html>\n'

    def _markdown(self) -> str:
        return "\n\n".join(f"**{who}**\n\n{output.to_markdown()}" for who, output in self.turns) + "\n"

    def _json(self) -> str:
        turns = [{"role": who, **output.to_dict()} for who, output in self.turns]
        return json.dumps(turns, ensure_ascii=False, indent=2) + "\n"


def split_line(line: str) -> list[str]:
    """Cut a line into texts and the paths of the images in it; quotes and backslashes may hold a path together."""
    parts, start = [], 0
    for word in _WORD.finditer(line):
        raw = word[0]
        path = raw[1:-1] if raw[0] in "\"'" and raw[-1] == raw[0] else re.sub(r"\\(.)", r"\1", raw)
        path = raw if is_image_file(raw) else path
        if is_image_file(path):
            parts += [line[start : word.start()].strip(), path]
            start = word.end()
    return [part for part in (*parts, line[start:].strip()) if part]
