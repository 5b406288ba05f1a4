"""Chat messages become the texts and images that a chat template makes of them."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from visual_ground.errors import GroundingValueError


def is_chat(prompt: Any) -> bool:
    """Return whether a prompt is a list of chat messages, `{"role": ..., "content": ...}`."""
    return (
        isinstance(prompt, (list, tuple))
        and bool(prompt)
        and all(isinstance(m, Mapping) and "role" in m for m in prompt)
    )


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the parts, texts and images, of chat messages as the tokenizer's chat template orders them.

    Args:
        tokenizer: whose template it is.
        messages: `{"role": ..., "content": ...}`; a content is a text or a list of parts.

    Raises:
        GroundingValueError: the tokenizer has no template, or one that refuses these messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise GroundingValueError(
            "These chat messages need a chat template, and the tokenizer has none. Set tokenizer.chat_template, "
            "or write the prompt as a list of text and images."
        )
    mark, images = f"<{uuid.uuid4().hex}>", []
    plain = []
    for message in messages:
        content = message["content"]
        pieces = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = ""
        for piece in pieces:
            if piece.get("type") == "image":
                images.append(_image_of(piece))
                text += mark
            else:
                text += piece["text"]
        plain.append({**message, "content": text})
    generate = messages[-1]["role"] != "assistant"
    try:
        rendered = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=generate)
    except TemplateError as error:
        roles = [message["role"] for message in messages]
        raise GroundingValueError(f"The chat template refuses messages of the roles {roles}: {error}") from error
    parts: list[Any] = []
    for i, text in enumerate(rendered.split(mark)):
        parts += [images[i - 1]] if i else []
        parts += [text] if text else []
    return parts


def _image_of(piece: Mapping[str, Any]) -> Any:
    image = next((piece[key] for key in ("image", "path", "url") if key in piece), None)
    if image is None:
        raise GroundingValueError(f'An image part needs "image" or "path", got the keys {sorted(piece)}.')
    return image
