"""Prompts: interleaved text and images, or chat messages, become token ids with virtual rows."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor

from visual_ground.config import GroundingConfig
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
        config: which tokens stand for `[RET]` and in front of captions, and k, the ids per image.
        ret_token_id: the id of `[RET]`.
    """

    def __init__(self, tokenizer: Any, config: GroundingConfig, ret_token_id: int) -> None:
        self.tokenizer, self.config, self.ret_token_id = tokenizer, config, ret_token_id

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
        ids: list[int] = []
        images: list[Image.Image] = []
        texts = 0
        for part in parts:
            if isinstance(part, str) and not _names_image(part):
                opening = self._opening if not (chat or texts) and (self.config.image_first or not images) else ()
                ids += [*opening, *(self.continue_text(part) if ids else self.encode_text(part))]
                texts += 1
            elif isinstance(part, (str, os.PathLike, Image.Image)):
                # An LM's first position is its attention sink, which an image must not become.
                sink = () if chat or ids or self.config.image_first else self.sink
                ids += [*sink, *self._marks(len(images))]
                images.append(to_rgb(part))
            else:
                raise GroundingTypeError(
                    "A prompt is a string, a PIL image, a path, a list mixing them, or a list of chat messages; "
                    f"got a part of type {type(part).__name__}."
                )
        if not ids:
            raise GroundingValueError("The prompt is empty: it has neither text nor images. Give at least one token.")
        return EncodedPrompt(tuple(ids), tuple(images))

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a text without special tokens in front; `[RET]` in it becomes its id."""
        ids: list[int] = []
        for i, piece in enumerate(text.split(self.config.ret_token)):
            ids += [self.ret_token_id] if i else []
            ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
        return ids

    def continue_text(self, text: str) -> list[int]:
        """Return the ids of a text that stands after other ids.

        Tokenizers that put a space before every text themselves are not given a second one.
        """
        return self.encode_text(text[1:] if self._adds_space and text[:1] == " " and text[1:] else text)

    def encode_caption(self, caption: str) -> list[int]:
        """Return the ids of a caption as it stands after `caption_lead`; these are what the losses are about.

        Raises:
            GroundingTypeError: not a string.
            GroundingValueError: a caption with no tokens.
        """
        if not isinstance(caption, str):
            raise GroundingTypeError(f"A caption must be a string, got {type(caption).__name__}.")
        text = caption.strip()
        ids = self.continue_text(" " + text) if self.config.caption_prompt else self.encode_text(text)
        if not ids or not caption.strip():
            raise GroundingValueError(f"The caption {caption!r} has no tokens. Leave the example out.")
        return [*self.sink, *ids] if self.config.image_first else ids

    def caption_lead(self, image: bool) -> list[int]:
        """Return what stands before a caption: the sink token and the prompt, with the image's marks where asked.

        With `image_first` the sink token belongs to the caption: it comes after the image, and is predicted from it.
        """
        sink = [] if self.config.image_first else list(self.sink)
        prompt = self.config.image_prompt if image else self.config.caption_prompt
        before, _, after = prompt.partition("{image}")
        marks = self._marks(0) if image else []
        return [*sink, *self.encode_text(before), *marks, *self.continue_text(after)]

    def _marks(self, image: int) -> list[int]:
        return [-1 - image] * self.config.num_visual_tokens

    @cached_property
    def _adds_space(self) -> bool:
        """Whether the tokenizer puts a space, which sentencepiece and byte-level tokens show, before every text."""
        first = self.tokenizer("a", add_special_tokens=False)["input_ids"][:1]
        return any(token[:1] in ("\u2581", "\u0120") for token in self.tokenizer.convert_ids_to_tokens(first))

    @cached_property
    def _opening(self) -> tuple[int, ...]:
        """The special ids that the tokenizer puts in front of a text by itself."""
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self.tokenizer("a")["input_ids"]
        return tuple(next((whole[:i] for i in range(len(whole)) if whole[i : i + len(plain)] == plain), []))

    @cached_property
    def sink(self) -> tuple[int, ...]:
        """The ids that open a sequence: the configured sink token, or the tokenizer's own opening, BOS or EOS."""
        if self.config.sink_token is not None:
            return tuple(self.tokenizer(self.config.sink_token, add_special_tokens=False)["input_ids"])
        own = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return self._opening or tuple(token for token in own if token is not None)[:1]

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
        try:
            rendered = self.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=generate)
        except TemplateError as error:
            roles = [message["role"] for message in messages]
            raise GroundingValueError(f"The chat template refuses messages of the roles {roles}: {error}") from error
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


def as_batch(prompts: Any) -> list[Any]:
    """Return a list of prompts: one string, image, path or chat alone is a batch of one.

    Raises:
        GroundingTypeError: neither a prompt nor a list of prompts.
    """
    if isinstance(prompts, (str, os.PathLike, Image.Image)) or is_chat(prompts):
        return [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise GroundingTypeError(f"Prompts must be a list of prompts, or one alone, got {type(prompts).__name__}.")
    return list(prompts)


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
