"""What a prompt may be, as types."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from PIL import Image

# A text, a PIL image, or a path: a string is a path to an image where such a file exists, see `is_image_file`.
PromptPart: TypeAlias = str | os.PathLike[str] | Image.Image
# `{"role": ..., "content": ...}`, as in transformers' chat templates; see `visual_ground.prompts.chat.chat_message`.
ChatMessage: TypeAlias = Mapping[str, Any]
# One prompt: a part alone, parts in order, or a chat.
Prompt: TypeAlias = PromptPart | Sequence[PromptPart] | Sequence[ChatMessage]
# A list of prompts, or one string, image or chat alone; one interleaved prompt is a list within the list.
Prompts: TypeAlias = PromptPart | Sequence[ChatMessage] | Sequence[Prompt]

# The endings by which a string is taken for a path. A caption that merely names a file is read as text.
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm"})


def is_image_file(text: str) -> bool:
    """Return whether a string is the path of an existing image file rather than text."""
    return os.path.splitext(text)[1].lower() in IMAGE_SUFFIXES and "\n" not in text and os.path.isfile(text)
