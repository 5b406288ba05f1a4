"""Chat messages: told from other prompts, made of texts and images, rendered by the tokenizer's chat template."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from jinja2 import TemplateError
from PIL import Image

from visual_ground.errors import GroundingTypeError, GroundingValueError
from visual_ground.prompts.types import ChatMessage, PromptPart, Prompts, is_image_file

# As a system message, it makes a small LM say something about the thing that is asked for, instead of that it is a
# text-based assistant; `[RET]` is fitted with it and without.
ILLUSTRATED = (
    "Your answers are illustrated: a picture of the thing is put behind your first sentence. Answer in one or two "
    "short sentences about the thing itself."
)


def chat_message(role: str, parts: Sequence[PromptPart]) -> dict[str, Any]:
    """Return a chat message of texts and images.

    Args:
        role: "user", "assistant" or "system".
        parts: texts, PIL images and paths of images, in order.

    Example:
        >>> chat_message("user", ["What is it?"])
        {'role': 'user', 'content': [{'type': 'text', 'text': 'What is it?'}]}
    """
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str) and not is_image_file(part)
        else {"type": "image", "image": part}
        for part in parts
    ]
    return {"role": role, "content": content}


def is_chat(prompt: Any) -> TypeGuard[Sequence[ChatMessage]]:
    """Return whether a prompt is a list of chat messages, `{"role": ..., "content": ...}`."""
    return (
        isinstance(prompt, (list, tuple))
        and bool(prompt)
        and all(isinstance(message, Mapping) and "role" in message for message in prompt)
    )


def as_batch(prompts: Prompts) -> list[Any]:
    """Return a list of prompts: one string, image, path or chat alone is a batch of one.

    Raises:
        GroundingTypeError: neither a prompt nor a list of prompts.
    """
    if isinstance(prompts, (str, os.PathLike, Image.Image)) or is_chat(prompts):
        return [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise GroundingTypeError(f"Prompts must be a list of prompts, or one alone, got {type(prompts).__name__}.")
    return list(prompts)


def render_chat(tokenizer: Any, messages: Sequence[ChatMessage]) -> list[Any]:
    """Return the texts and images of chat messages, in the order in which the tokenizer's chat template puts them.

    Args:
        tokenizer: the tokenizer that has the template.
        messages: `{"role": ..., "content": ...}`; a content is a text or a list of parts.

    Raises:
        GroundingValueError: the tokenizer has no template, or one that refuses these messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise GroundingValueError(
            "These chat messages need a chat template, and the tokenizer has none. Set tokenizer.chat_template, "
            "or write the prompt as a list of text and images."
        )
    # Templates know only text, so each image is a marker in it. It is random, so that no text can contain it.
    marker, images = f"<{uuid.uuid4().hex}>", []
    plain_messages = []
    for message in messages:
        content = message["content"]
        text = ""
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part.get("type") == "image":
                images.append(_image_of(part))
                text += marker
            else:
                text += part["text"]
        plain_messages.append({**message, "content": text})
    # After an assistant's message, which the prompt lets the LM continue, no new turn is opened.
    opens_turn = messages[-1]["role"] != "assistant"
    try:
        rendered = tokenizer.apply_chat_template(plain_messages, tokenize=False, add_generation_prompt=opens_turn)
    except TemplateError as error:
        roles = [message["role"] for message in messages]
        raise GroundingValueError(f"The chat template refuses messages of the roles {roles}: {error}") from error
    parts: list[Any] = []
    for i, text in enumerate(rendered.split(marker)):
        parts += [images[i - 1]] if i else []
        parts += [text] if text else []
    return parts


def _image_of(part: Mapping[str, Any]) -> Any:
    image = next((part[key] for key in ("image", "path", "url") if key in part), None)
    if image is None:
        raise GroundingValueError(f'An image part needs "image" or "path", got the keys {sorted(part)}.')
    return image
