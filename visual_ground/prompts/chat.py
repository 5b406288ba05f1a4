"""Chat messages: read in the forms that people write them in, and rendered by the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from visual_ground.errors import GroundingTypeError, GroundingValueError
from visual_ground.prompts.parts import Parts, is_given, read_content, read_part
from visual_ground.prompts.template import render_template
from visual_ground.prompts.types import ChatMessage, PromptPart, Prompts
from visual_ground.vision.images import is_single

# As a system message, it makes a small LM say something about the thing that is asked for, instead of that it is a
# text-based assistant; `[RET]` is fitted with it and without.
ILLUSTRATED = (
    "Your answers are illustrated: a picture of the thing is put behind your first sentence. Answer in one or two "
    "short sentences about the thing itself."
)

# Besides its content, what a message without words may have.
CALLS = ("tool_calls", "function_call", "tool_call_id")
# Where the messages of other programs have images besides the content; none of these says which part it belongs to.
IMAGES_ELSEWHERE = ("image", "files", "attachments", "experimental_attachments")


def chat_message(role: str, parts: Sequence[PromptPart]) -> dict[str, Any]:
    """Return a chat message of texts and images; a string is an image where `is_image_string` says so.

    Example:
        >>> chat_message("user", ["What is it?"])
        {'role': 'user', 'content': [{'type': 'text', 'text': 'What is it?'}]}
    """
    read = [one for part in parts for one in read_part(part)]
    return typed_message(role, [part if isinstance(part, str) else part.image for part in read])


def typed_message(role: str, parts: Sequence[Any]) -> dict[str, Any]:
    """Return a chat message of texts and images that say what they are, so that no text is taken for a path."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return {"role": role, "content": content}


def is_chat(prompt: Any) -> TypeGuard[Sequence[Any]]:
    """Return whether a prompt is a list of chat messages, `{"role": ..., "content": ...}` or objects with these."""
    return isinstance(prompt, (list, tuple)) and bool(prompt) and all(map(is_message, prompt))


def is_message(value: Any) -> bool:
    """Return whether an object is one chat message."""
    return "role" in value if isinstance(value, Mapping) else hasattr(value, "role") and hasattr(value, "content")


def render_chat(tokenizer: Any, messages: Sequence[Any]) -> Parts:
    """Return the texts and images of chat messages, in the order in which the tokenizer's chat template puts them.

    Raises:
        GroundingTypeError: a part that is neither text nor image.
        GroundingValueError: the tokenizer has no template, or one that refuses these messages or loses their images.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise GroundingValueError(
            "These chat messages need a chat template, and the tokenizer has none. Set tokenizer.chat_template, "
            "or write the prompt as a list of text and images."
        )
    mappings = [as_message(message) for message in messages]
    return render_template(tokenizer, mappings, [read_message(message) for message in mappings])


def as_message(message: Any) -> ChatMessage:
    """Return a message as a mapping: agents and clients have objects, with roles that may be enums."""
    if not isinstance(message, Mapping):
        names = ("role", "content", "name", "images", "parts", *CALLS, *IMAGES_ELSEWHERE)
        message = {name: getattr(message, name, None) for name in names}
        message = {name: value for name, value in message.items() if value is not None or name == "content"}
    return {**message, "role": str(getattr(message["role"], "value", message["role"]))}


def read_message(message: ChatMessage) -> Parts:
    """Return the texts and images of a message, as from `as_message`.

    Gemini's and Vercel's messages have `parts` in place of `content`, and Ollama's `images` beside it.

    Raises:
        GroundingTypeError: without content, with images in another place, or a part that is neither text nor image.
        GroundingValueError: an image part without an image.
    """
    role = message["role"]
    if elsewhere := [key for key in IMAGES_ELSEWHERE if is_given(message.get(key))]:
        raise GroundingTypeError(
            f"A message of {role!r} has {elsewhere}, which would not be read. Put the images into its content, as "
            '{"type": "image", "image": ...}.'
        )
    content = message["parts"] if message.get("content") is None and "parts" in message else message.get("content")
    # Beside a call of a tool, there may be no words.
    if content is None and not any(is_given(message.get(name)) for name in (*CALLS, "images")):
        raise GroundingTypeError(f"A message of {role!r} has no content. Give it a text, or leave the message out.")
    images = message.get("images") or ()
    return [
        *(part for image in images for part in read_content({"type": "image", "image": image}, role)),
        *read_content(content, role),
    ]


def as_batch(prompts: Prompts) -> list[Any]:
    """Return a list of prompts: one string, image, path or chat alone is a batch of one.

    Raises:
        GroundingTypeError: neither a prompt nor a list of prompts.
    """
    if is_single(prompts) or is_message(prompts) or is_chat(prompts):
        return [prompts]
    # A column of a table is a list too: a `datasets.Column`, a pandas Series, an array of strings.
    column: Any = prompts
    is_column = isinstance(column, Sequence) or len(getattr(column, "shape", ())) == 1
    if not is_column or isinstance(column, Mapping):
        raise GroundingTypeError(f"Prompts must be a list of prompts, or one alone, got {type(prompts).__name__}.")
    return list(column)
