"""The parts of a prompt, as transformers, OpenAI, Anthropic, gradio and agents write them, become texts and images."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from visual_ground.errors import GroundingTypeError, GroundingValueError
from visual_ground.prompts.types import ImagePart, is_image_file, is_image_string
from visual_ground.vision.images import ImageFile, has_pixels, shortened

Parts: TypeAlias = list[str | ImagePart]

# By type, the key under which a part has its text.
TEXT_KEYS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
IMAGE_TYPES = ("image", "image_url", "input_image", "file")
# Where a part of these types has its image, or a mapping that has it; the first that is there.
IMAGE_KEYS = (
    "image",
    "image_url",
    "source",
    "file",
    "bytes",
    "path",
    "inline_data",
    "inlineData",
    "base64",
    "data",
    "url",
    "value",
)
# Of these, the ones that beside a text are certain to be an image.
CERTAIN_KEYS = ("image", "image_url", "images", "bytes", "inline_data", "inlineData")


def read_content(content: Any, role: str = "") -> Parts:
    """Return the texts and images of a message's content: a text, a part, a list of parts, or None for no part.

    Raises:
        GroundingTypeError: a part that is neither text nor image.
        GroundingValueError: an image part without an image.
    """
    if content is None:
        return []
    if isinstance(content, str):
        return [content]  # A message's whole content is never a path.
    if isinstance(content, tuple) and content and isinstance(content[0], str) and len(content) <= 2:
        return [ImagePart(content[0])]  # gradio: (path,) or (path, alternative text).
    if isinstance(content, (list, tuple)):
        return [part for position, one in enumerate(content) for part in _read(one, f"content[{position}]", role)]
    return _read(content, "content", role)


def read_part(part: Any) -> Parts:
    """Return the texts and images, mostly one, of a part: a string, an image, or a mapping with a type.

    Example:
        >>> read_part({"type": "input_text", "text": "cat.png"}), read_part("cat.png")
        (['cat.png'], [ImagePart(image='cat.png')])
    """
    return _read(part, "a part", "")


def _read(part: Any, place: str, role: str) -> Parts:
    if isinstance(part, ImagePart):
        return [part]
    if isinstance(part, str):
        if not is_image_string(part):
            return [part]
        return [ImagePart(part if is_image_file(part) else part.strip())]
    if isinstance(part, Mapping):
        return _read_mapping(part, f"{place} of a message of {role!r}" if role else place)
    if has_pixels(part) or isinstance(part, (bytes, bytearray, memoryview, ImageFile)) or hasattr(part, "__fspath__"):
        return [ImagePart(part)]
    raise GroundingTypeError(
        "A prompt is a string, an image (PIL, path, URL, bytes, array), a list mixing them, or a list of chat "
        f"messages; got {place} of type {type(part).__name__}."
    )


def _read_mapping(part: Mapping[str, Any], place: str) -> Parts:
    kind = part.get("type", part.get("component"))
    if kind in TEXT_KEYS:
        _refuse_others(part, CERTAIN_KEYS, place)
        return [_text_of(part, TEXT_KEYS[kind], place)]
    if kind in IMAGE_TYPES:
        _refuse_others(part, ("text",), place)
        return [ImagePart(_image_of(part, place))]
    if kind is None and "files" in part:  # gradio's multimodal textbox.
        images: Parts = [ImagePart(_image_of({"file": file}, place)) for file in part["files"] or ()]
        return [*images, *([part["text"]] if part.get("text") else [])]
    has_text, has_image = isinstance(part.get("text"), str), any(is_given(part.get(key)) for key in CERTAIN_KEYS)
    if kind is None and has_text:
        return [*([ImagePart(_image_of(part, place))] if has_image else []), *([part["text"]] if part["text"] else [])]
    if kind is None and any(part.get(key) is not None for key in IMAGE_KEYS):
        return [ImagePart(_image_of(part, place))]
    known = sorted({*TEXT_KEYS, *IMAGE_TYPES})
    what = f"the type {kind!r}" if kind is not None else "no type"
    raise GroundingTypeError(
        f"{place} has {what} (keys {sorted(map(str, part))}), and a prompt holds texts and images: parts of the types "
        f"{known}. Leave it out, or say it in words."
    )


def is_given(value: Any) -> bool:
    """Return whether a key has a value: datasets that hold parts of several types as one table fill up with these."""
    return value is not None and not (isinstance(value, (str, bytes, list, tuple, Mapping)) and not value)


def _refuse_others(part: Mapping[str, Any], keys: Sequence[str], place: str) -> None:
    """Raise where a part that is typed text holds an image too, or the other way round: one of them would be lost."""
    if found := [key for key in keys if is_given(part.get(key))]:
        raise GroundingTypeError(
            f"{place} has the type {part['type']!r} and {found} besides, which would be lost. Make two parts of it."
        )


def _text_of(part: Mapping[str, Any], key: str, place: str) -> str:
    text = part.get(key)
    text = text.get("value") if isinstance(text, Mapping) else text
    if not isinstance(text, str):
        raise GroundingTypeError(f"{place} is a text and has {type(text).__name__} under {key!r}, not a string.")
    return text


def _image_of(part: Mapping[str, Any], place: str) -> Any:
    """Return the image of a part, which may be some mappings deep: {"image_url": {"url": ...}}."""
    media = part.get("mime_type") or part.get("media_type") or part.get("mimeType") or "image/"
    if not str(media).startswith("image/"):
        raise GroundingTypeError(f"{place} is a file of the kind {media!r}, and a prompt holds texts and images.")
    key = next((key for key in IMAGE_KEYS if part.get(key) is not None), None)
    if key is None:
        raise GroundingValueError(
            f'{place} is an image part and holds no image: it needs "image", "path", "url", "image_url" or "bytes", '
            f"got the keys {sorted(map(str, part))}."
        )
    value = part[key]
    if key in ("base64", "data") and isinstance(value, str) and not value[:5].lower() == "data:":
        try:
            return base64.b64decode(value)
        except ValueError as error:
            raise GroundingValueError(f"{place} has {shortened(value)} under {key!r}: no base64 ({error}).") from error
    if isinstance(value, Mapping):
        return _image_of(value, place)
    return value[0] if key == "value" and isinstance(value, (list, tuple)) and value else value
