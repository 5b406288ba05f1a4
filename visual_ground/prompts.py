"""Prompts: interleaved text and images, or chat messages, become token ids with virtual rows."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from visual_ground.errors import GroundingTypeError, GroundingValueError
from visual_ground.images import to_rgb

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm"})


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt as ids; image j of the prompt stands in `ids` as the k numbers -1 - j.

    Args:
        ids: token ids, and negative marks for images.
        images: the prompt's images, upright RGB, in order.
    """

    ids: tuple[int, ...]
    images: tuple[Image.Image, ...]


class PromptEncoder:
    """Turns prompts into ids.

    Args:
        tokenizer: a transformers tokenizer, never written to.
        ret_token: the text that stands for `[RET]`.
        ret_token_id: its id.
        num_visual_tokens: k, ids per image.
    """

    def __init__(self, tokenizer: Any, ret_token: str, ret_token_id: int, num_visual_tokens: int = 1) -> None:
        self.tokenizer, self.ret_token, self.ret_token_id = tokenizer, ret_token, ret_token_id
        self.num_visual_tokens = num_visual_tokens

    def encode(self, prompt: Any) -> EncodedPrompt:
        """Encode one prompt.

        Args:
            prompt: a string, a PIL image, a path to an image, a list mixing them, or a list of chat messages.

        Raises:
            GroundingTypeError: a part that is none of these.
            GroundingValueError: chat messages without a chat template, an unreadable image, or nothing at all.
        """
        chat = is_chat(prompt)
        parts = self._render(prompt) if chat else prompt if isinstance(prompt, (list, tuple)) else [prompt]
        ids = [] if chat else self._prefix()
        images: list[Image.Image] = []
        for part in parts:
            if isinstance(part, str) and not _names_image(part):
                ids += self._encode_text(part)
            elif isinstance(part, (str, os.PathLike, Image.Image)):
                ids += [-1 - len(images)] * self.num_visual_tokens
                images.append(to_rgb(part))
            else:
                raise GroundingTypeError(
                    "A prompt is a string, a PIL image, a path, a list mixing them, or a list of chat messages; "
                    f"got a part of type {type(part).__name__}."
                )
        if not ids:
            raise GroundingValueError("The prompt is empty: it has neither text nor images. Give at least one token.")
        return EncodedPrompt(tuple(ids), tuple(images))

    def _encode_text(self, text: str) -> list[int]:
        ids: list[int] = []
        for i, piece in enumerate(text.split(self.ret_token)):
            ids += [self.ret_token_id] if i else []
            ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
        return ids

    def _prefix(self) -> list[int]:
        """Return the special ids that the tokenizer puts in front of a text by itself."""
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self.tokenizer("a")["input_ids"]
        return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(plain)] == plain), [])

    def _render(self, messages: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Apply the chat template with a mark for each image, then cut the text at the marks."""
        if not getattr(self.tokenizer, "chat_template", None):
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
        rendered = self.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=generate)
        parts: list[Any] = []
        for i, text in enumerate(rendered.split(mark)):
            parts += [images[i - 1]] if i else []
            parts += [text] if text else []
        return parts


def is_chat(prompt: Any) -> bool:
    """Return whether a prompt is a list of chat messages, `{"role": ..., "content": ...}`."""
    return (
        isinstance(prompt, (list, tuple))
        and bool(prompt)
        and all(isinstance(m, Mapping) and "role" in m for m in prompt)
    )


def pad_batch(encoded: Sequence[EncodedPrompt], first_image_id: int, pad_id: int, side: str) -> tuple[Tensor, Tensor]:
    """Stack prompts into ids (b, s) and their attention mask (b, s); images get ids in order over the whole batch.

    Args:
        encoded: the prompts.
        first_image_id: id of the first image row.
        pad_id: id to pad with; masked, so any real id does.
        side: "left", for generation, or "right".

    Raises:
        GroundingValueError: no prompts.
    """
    if not encoded:
        raise GroundingValueError("The batch is empty; give at least one prompt.")
    length = max(len(prompt.ids) for prompt in encoded)
    ids = torch.full((len(encoded), length), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    next_id = first_image_id
    for row, prompt in enumerate(encoded):
        start = length - len(prompt.ids) if side == "left" else 0
        place = slice(start, start + len(prompt.ids))
        values = list(prompt.ids)
        for i, value in enumerate(values):
            if value < 0:
                values[i], next_id = next_id, next_id + 1
        ids[row, place], mask[row, place] = torch.tensor(values), 1
    return ids, mask


def _names_image(text: str) -> bool:
    """Return whether a string is a path to an existing image file rather than text."""
    return os.path.splitext(text)[1].lower() in IMAGE_SUFFIXES and "\n" not in text and os.path.isfile(text)


def _image_of(piece: Mapping[str, Any]) -> Any:
    image = next((piece[key] for key in ("image", "path", "url") if key in piece), None)
    if image is None:
        raise GroundingValueError(f'An image part needs "image" or "path", got the keys {sorted(piece)}.')
    return image
