"""What a prompt may be, as types, and which strings in it are images."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from visual_ground.vision.decoding import is_image
from visual_ground.vision.formats import IMAGE_SUFFIXES, OTHER_SUFFIXES
from visual_ground.vision.images import ImageLike, is_base64_image

# A text or an image; a string is an image where `is_image_string` says so. Or a typed part, {"type": "text", ...}.
PromptPart: TypeAlias = ImageLike | Mapping[str, Any]
# `{"role": ..., "content": ...}`, as in transformers' chat templates; see `visual_ground.prompts.chat.chat_message`.
ChatMessage: TypeAlias = Mapping[str, Any]
# One prompt: a part alone, parts in order, or a chat.
Prompt: TypeAlias = PromptPart | Sequence[PromptPart] | Sequence[ChatMessage]
# A list of prompts, or one string, image or chat alone; one interleaved prompt is a list within the list.
Prompts: TypeAlias = PromptPart | Sequence[ChatMessage] | Sequence[Prompt]

# What stands before an image's address and never before words.
IMAGE_SCHEMES = re.compile(r"data:([\w.+-]+/[\w.+-]+)?[;,]|file:/", re.IGNORECASE)
# How a path starts that may have spaces in it; any other text with spaces is words that end with a file's name.
ROOTED = re.compile(r"(/|~|\.{1,2}/|[A-Za-z]:[\\/]|\w+://)")


@dataclass(frozen=True)
class ImagePart:
    """A part of a prompt that is known to be an image, and must be opened.

    Args:
        image: in any form that `visual_ground.vision.images.to_rgb` reads.
    """

    image: Any


def is_image_file(text: str) -> bool:
    """Return whether a string is the path of an existing file that is an image by its content."""
    path = os.path.expanduser(text) if text[:1] == "~" else text
    return "\n" not in text and os.path.isfile(path) and is_image(path)


def is_image_string(text: str) -> bool:
    """Return whether a string that nothing types as text or image is an image.

    It is where it is the path of an image that exists, whatever its ending, and where it reads like the path or URL of
    one, or is the base64 of one: then it must be opened, and is no text if it is missing. Words that end with a file's
    name are text.

    Example:
        >>> [is_image_string(text) for text in ("cat.png", "~/my cat.AVIF", "https://example.org/cat.jpg?size=2")]
        [True, True, True]
        >>> [is_image_string(text) for text in ("a cat", "What is in cat.png", "https://example.org", ".png")]
        [False, False, False, False]
    """
    text = text.strip()  # As it comes from a file's line or a shell.
    if IMAGE_SCHEMES.match(text) or is_base64_image(text):
        return True
    if not text or "\n" in text:
        return False
    path = re.split("[?#]", text)[0] if "://" in text else text
    stem, suffix = os.path.splitext(path)
    named = suffix.lower() in IMAGE_SUFFIXES | OTHER_SUFFIXES and bool(stem)
    return (named and (not re.search(r"\s", text) or bool(ROOTED.match(text)))) or is_image_file(text)
