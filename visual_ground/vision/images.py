"""Reading images: a PIL image of any mode, or a file, becomes upright RGB, or one clear error."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from visual_ground.errors import GroundingTypeError, GroundingValueError

# A PIL image, a path, or `{"bytes": ..., "path": ...}`, as `datasets` holds an image that is not decoded yet.
ImageLike: TypeAlias = Image.Image | str | os.PathLike[str] | Mapping[str, Any]
# One image, or many in order.
Images: TypeAlias = ImageLike | Iterable[ImageLike]


def to_rgb(image: ImageLike) -> Image.Image:
    """Return an image as upright 8-bit RGB; transparency becomes white.

    Args:
        image: a PIL image of any mode (also palette, RGBA, CMYK, 16-bit), a path, or `{"bytes": ..., "path": ...}`, as
            `datasets` holds an image that is not decoded yet.

    Returns:
        An RGB image. A file that was opened here is closed again.

    Raises:
        GroundingTypeError: none of these.
        GroundingValueError: missing, unreadable, truncated, without pixels, or over Pillow's decompression limit.

    Example:
        >>> to_rgb(Image.new("L", (4, 4), 255)).getpixel((0, 0))
        (255, 255, 255)
    """
    if isinstance(image, Image.Image):
        return _decode(image, f"{type(image).__name__} of mode {image.mode}")
    return decode_file(read_file(image), image_name(image))


def image_name(image: ImageLike) -> str:
    """Return what an image is called in messages: its path where it has one.

    Example:
        >>> image_name({"bytes": b"", "path": "shard/000.jpg"})
        "'shard/000.jpg'"
    """
    if isinstance(image, Mapping):
        return repr(image.get("path") or "bytes without a path")
    return repr(os.fspath(image)) if isinstance(image, (str, os.PathLike)) else f"{type(image).__name__}"


def read_file(image: ImageLike) -> bytes:
    """Return the bytes of an image's file, given as a path or as `{"bytes": ..., "path": ...}`.

    Raises:
        GroundingTypeError: neither of these.
        GroundingValueError: the file cannot be opened.
    """
    path: Any = image
    if isinstance(image, Mapping):
        if image.get("bytes") is not None:
            return bytes(image["bytes"])
        path = image.get("path")
    if not isinstance(path, (str, os.PathLike)):
        raise GroundingTypeError(f"An image must be a PIL image or a path, got {type(image).__name__}.")
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise GroundingValueError(f"The image {os.fspath(path)!r} cannot be opened: {error}.") from error


def decode_file(data: bytes, name: str) -> Image.Image:
    """Return the bytes of an image's file as RGB, as `to_rgb` does; `name` is for messages."""
    try:
        with warnings.catch_warnings():
            # Pillow only warns at its decompression limit, and raises at twice as much.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise GroundingValueError(f"{name} is not an image that Pillow can read.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise GroundingValueError(f"{name} is too large: {error} Scale it down, or load it yourself.") from error
    except OSError as error:
        raise GroundingValueError(f"The image {name} cannot be opened: {error}.") from error
    with opened:
        return _decode(opened, name)


def _decode(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise GroundingValueError(f"The image {name} has no pixels: its size is {image.size}.")
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise GroundingValueError(f"The image {name} is damaged or truncated: {error}.") from error
    if image.mode.startswith("I") or image.mode == "F":
        return _scale_to_bytes(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(background, image).convert("RGB")
    return image.convert("RGB")


def _scale_to_bytes(image: Image.Image) -> Image.Image:
    """Map a 16-bit, 32-bit or float image to 8 bits; Pillow's own conversion clips at 255."""
    # A float image up to 1 and whole numbers up to 255 are 8 bits already, and up to 65535 are 16; what is brighter is
    # scaled by its own maximum.
    values = np.asarray(image, dtype=np.float64)
    values = np.nan_to_num(values, posinf=values[np.isfinite(values)].max(initial=0))
    top = values.max(initial=0)
    scale = 1 if image.mode == "F" and top <= 1 else 255 if top <= 255 else 65535 if top <= 65535 else top
    return Image.fromarray(np.clip(values / scale * 255, 0, 255).round().astype(np.uint8))
