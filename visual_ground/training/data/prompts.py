"""The optional column `prompt`: texts and images, in any order or as a chat, after which `[RET]` is said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from visual_ground.errors import GroundingError
from visual_ground.prompts.chat import as_message, is_chat, read_message
from visual_ground.prompts.parts import Parts, read_part
from visual_ground.prompts.processor import GroundingProcessor
from visual_ground.prompts.types import ImagePart
from visual_ground.training.data.rows import is_missing

# The column's name.
PROMPT = "prompt"


@dataclass(frozen=True)
class SplitPrompt:
    """A prompt and its images, apart: the images are encoded once, and the prompt is written anew in each epoch.

    Args:
        template: a text, parts in order, or chat messages, with a placeholder for each image.
        images: as they are in the dataset.

    Example:
        >>> SplitPrompt.of(["cat.png", "The same in blue."], lambda image: image).images
        ('cat.png',)
    """

    template: Any
    images: tuple[Any, ...]

    @classmethod
    def of(cls, prompt: Any, resolve: Callable[[Any], Any]) -> SplitPrompt:
        """Take the images out of a prompt; `resolve` gives the place of an image that is a relative path."""
        if isinstance(prompt, str):
            return cls(prompt, ())
        images: list[Any] = []

        def typed(part: str | ImagePart) -> dict[str, Any]:
            if isinstance(part, str):
                return {"type": "text", "text": part}
            images.append(resolve(part.image))
            return {"type": "image", "image": _placeholder(len(images) - 1)}

        turns = [(role, [typed(part) for part in parts]) for role, parts in _turns(prompt)]
        chat: list[Any] = [{"role": role, "content": content} for role, content in turns]
        return cls(turns[0][1] if turns[0][0] is None else chat, tuple(images))


@dataclass(frozen=True)
class PromptIds:
    """A prompt as ids, with negative marks for image tokens.

    Args:
        ids: the ids before `[RET]`.
        order: the numbers of the prompt's images, in the order of their marks.
    """

    ids: tuple[int, ...]
    order: tuple[int, ...]

    @classmethod
    def of(cls, processor: GroundingProcessor, template: Any) -> PromptIds:
        """Encode a template, a text as a caption is, as `embed_text` does."""
        if isinstance(template, str):
            return cls((*processor.caption_prefix(image=False), *processor.encode_caption(template)), ())
        encoded = processor.encode(template)
        # A chat template may put its messages in another order.
        return cls(encoded.ids, tuple(image.width - 1 for image in encoded.images))


def is_given(prompt: Any) -> bool:
    """Return whether a row's cell holds a prompt; one that is empty is none."""
    return not is_missing(prompt) and not (isinstance(prompt, (list, tuple)) and not prompt)


def prompt_problem(prompt: Any, problem_of: Callable[[str], str | None]) -> str | None:
    """Return why a prompt of a dataset cannot be used, or None; `problem_of` says the same of a text."""
    try:
        parts = [part for _, of_turn in _turns(prompt) for part in of_turn]
    except GroundingError as error:
        return f"cannot be read: {error}"
    texts = [part for part in parts if isinstance(part, str) and part.strip()]
    if not texts:
        return "has no text, which says what is to be found; add one, or leave the prompt out"
    return next((f"has a text that {problem}" for text in texts if (problem := problem_of(text))), None)


def _turns(prompt: Any) -> list[tuple[str | None, Parts]]:
    """Return the role and the parts of each message; all parts and no role where it is no chat."""
    if isinstance(prompt, str):
        return [(None, [prompt])]
    given = prompt if isinstance(prompt, (list, tuple)) else [prompt]
    if not is_chat(given):
        return [(None, [one for part in given for one in read_part(part)])]
    messages = [as_message(message) for message in given]
    return [(message["role"], read_message(message)) for message in messages]


def _placeholder(number: int) -> Image.Image:
    """Return an image whose width is its number, by which it is known again."""
    return Image.new("RGB", (number + 1, 1))
