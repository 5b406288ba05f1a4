"""Chat templates know only text: each image is a mark of its own in it, and must come out of the template once."""

from __future__ import annotations

import logging
import re
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from visual_ground.errors import GroundingValueError
from visual_ground.prompts.parts import Parts
from visual_ground.prompts.types import ChatMessage, ImagePart

logger = logging.getLogger(__name__)


def render_template(tokenizer: Any, messages: Sequence[ChatMessage], contents: Sequence[Parts]) -> Parts:
    """Render messages, and return the texts and images in the order in which the template puts them.

    Some templates read a message's content as a string, and some as a list of parts; either kind drops the other
    without a word. So both forms are rendered where the first one loses anything.

    Args:
        tokenizer: has the template.
        messages: with a role each, and whatever else the template reads.
        contents: for each message, its texts and images.

    Raises:
        GroundingValueError: the template refuses the messages, loses their last text, or does not show each image
            exactly once.
    """
    marked = _Marked.of(contents)
    attempts: list[_Rendered] = []
    refusals: list[Exception] = []
    for form in (marked.as_string, marked.as_list):
        try:
            text = _render(tokenizer, messages, [form(content) for content in marked.texts])
            probe = _render(tokenizer, messages, [form(content) for content in marked.probes])
        except Exception as error:  # A template that is given the other form adds strings to lists, and the like.
            refusals.append(error)
            continue
        attempts.append(marked.examine(text, probe))
        if not attempts[-1].lost_texts and not attempts[-1].wrong_images:
            break
    if not attempts:
        roles = [message["role"] for message in messages]
        raise GroundingValueError(
            f"The chat template refuses messages of the roles {roles}: {refusals[0]}"
        ) from refusals[0]
    best = min(attempts, key=lambda rendered: (len(rendered.wrong_images), len(rendered.lost_texts)))
    _check(best, marked, messages)
    return marked.split(best.text)


def _render(tokenizer: Any, messages: Sequence[ChatMessage], contents: Sequence[Any]) -> str:
    rewritten = [{**message, "content": content} for message, content in zip(messages, contents, strict=True)]
    # After an assistant's message, which the prompt lets the LM continue, no new turn is opened.
    opens_turn = messages[-1]["role"] != "assistant"
    return str(tokenizer.apply_chat_template(rewritten, tokenize=False, add_generation_prompt=opens_turn))


@dataclass(frozen=True)
class _Rendered:
    """What a template made of the messages.

    Args:
        text: the rendered text, with marks in it.
        wrong_images: for each image that is not there exactly once, by number, how often it is.
        lost_texts: the messages whose text is not there, by number.
    """

    text: str
    wrong_images: Mapping[int, int]
    lost_texts: tuple[int, ...]


@dataclass(frozen=True)
class _Marked:
    """Messages whose images are marks.

    Args:
        word: what every mark starts with; random, so that no text can contain it.
        texts: for each message, its text with marks in it.
        images: the images, by the numbers in their marks.
    """

    word: str
    texts: tuple[str, ...]
    images: tuple[ImagePart, ...]

    @classmethod
    def of(cls, contents: Sequence[Parts]) -> _Marked:
        # Letters and digits only: a template may write JSON or HTML, and would change anything else.
        word, images, texts = f"image{uuid.uuid4().hex}n", list[ImagePart](), list[str]()
        for content in contents:
            text = ""
            for part in content:
                if isinstance(part, ImagePart):
                    text += f"{word}{len(images):06d}"
                    images.append(part)
                else:
                    text += part
            texts.append(text)
        return cls(word, tuple(texts), tuple(images))

    def as_string(self, text: str) -> str:
        """Return a content as a string."""
        return text

    def as_list(self, text: str) -> list[dict[str, str]]:
        """Return a content as a list of one part; its guard shows where a template writes the list itself."""
        return [{"type": "text", "text": text, "guard": self._guard}] if text else []

    @property
    def _guard(self) -> str:
        return f"{self.word}guard"

    @property
    def probes(self) -> list[str]:
        """The texts, each with a mark of its own, which shows whether a template keeps the text."""
        # At the end, because templates of reasoning models cut off the beginning, the thoughts.
        return [f"{text}{self._probe(i)}" if text.strip() else text for i, text in enumerate(self.texts)]

    def _probe(self, message: int) -> str:
        return f"{self.word}text{message:06d}"

    def examine(self, text: str, probe: str) -> _Rendered:
        """Return what is wrong with a text that a template rendered; `probe` is the same with `probes` as the texts."""
        written_out = self._guard in text  # Then nothing in it is in its place.
        found = Counter() if written_out else Counter(map(int, re.findall(rf"{self.word}(\d{{6}})", text)))
        wrong = {number: found[number] for number in range(len(self.images)) if found[number] != 1}
        told = [i for i, content in enumerate(self.texts) if content.strip()]
        return _Rendered(text, wrong, tuple(i for i in told if written_out or self._probe(i) not in probe))

    def split(self, text: str) -> Parts:
        """Return a rendered text with the images in the places of their marks."""
        pieces: list[str] = re.split(rf"{self.word}(\d{{6}})", text)
        read: Callable[[int], Any] = lambda i: self.images[int(pieces[i])] if i % 2 else pieces[i]  # noqa: E731
        return [read(i) for i, piece in enumerate(pieces) if piece]


def _check(rendered: _Rendered, marked: _Marked, messages: Sequence[ChatMessage]) -> None:
    """Raise where images or the last text are lost; warn where an earlier text is."""
    forms = "whether contents are strings or lists of parts"
    advice = "Set tokenizer.chat_template to one that does not, send fewer messages, or write the prompt as a list."
    if rendered.wrong_images:
        did = [
            f"image {number + 1} of {len(marked.images)} {f'{count} times' if count else 'never'}"
            for number, count in list(rendered.wrong_images.items())[:5]
        ]
        raise GroundingValueError(
            f"The chat template shows {', '.join(did)}, {forms}, and each image must come exactly once. {advice}"
        )
    last = len(messages) - 1
    if last in rendered.lost_texts:
        raise GroundingValueError(
            f"The chat template loses the text of the last message, of the role {messages[last]['role']!r}, {forms}. "
            f"{advice}"
        )
    if lost := [i for i in rendered.lost_texts if messages[i]["role"] != "assistant"]:
        logger.warning("The chat template leaves out the text of the messages %s.", lost)
