"""Images in any form that users have them become upright 8-bit RGB, or one clear error."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable
from urllib.parse import unquote, unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np
from PIL import Image
from torch import Tensor

from visual_ground.errors import GroundingFileError, GroundingTypeError, GroundingValueError
from visual_ground.vision.arrays import from_array, is_array
from visual_ground.vision.decoding import decode, decode_file, is_image
from visual_ground.vision.link_rules import HOME, SCHEME, SCHEMES, LinkRules


@runtime_checkable
class ImageFile(Protocol):
    """A file object that gives bytes."""

    def read(self) -> bytes:
        """Return the rest of the file."""


# A PIL image; a path, `file:` or `data:` URL; a file's bytes or an open file; `{"bytes": ..., "path": ...}`, as
# `datasets` holds an image that is not decoded yet; an array or tensor of pixels (see `visual_ground.vision.arrays`).
ImageLike: TypeAlias = (
    Image.Image
    | str
    | os.PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | ImageFile
    | Mapping[str, Any]
    | np.ndarray
    | Tensor
)
# One image, or many in order.
Images: TypeAlias = ImageLike | Iterable[ImageLike]

NAME_LENGTH = 80  # Characters of an address that messages show; a data: URL has millions.
# Shorter strings are never taken for the base64 of a file: the smallest PNG has 67 bytes.
BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]{64,}={0,2}\s*")


def to_rgb(image: ImageLike, rules: LinkRules | None = None) -> Image.Image:
    """Return an image as upright 8-bit RGB; transparency becomes white.

    Deep pictures are scaled by their mode alone: 16-bit and 32-bit whole numbers by 65535, floats by 1. Numbers far
    outside are refused, not guessed at.

    Args:
        image: a PIL image of any mode (also palette, RGBA, CMYK, 16-bit), a path (`~` is the home folder), a `file:`,
            `data:` or `http(s):` URL, a file's bytes or their base64, a file object, `{"bytes": ..., "path": ...}`, or
            an array or tensor (h, w), (h, w, channels) or (channels, h, w).
        rules: the hosts that images may be fetched from; none where None.

    Returns:
        An RGB image. A file that was opened here is closed again.

    Raises:
        GroundingTypeError: none of these.
        GroundingValueError: missing, unreadable, truncated, without pixels, or over Pillow's decompression limit; a
            host that `rules` do not allow.

    Example:
        >>> to_rgb(Image.new("L", (4, 4), 255)).getpixel((0, 0))
        (255, 255, 255)
    """
    if isinstance(image, Image.Image):
        return decode(image, f"{type(image).__name__} of mode {image.mode}")
    if is_array(image):
        return decode(from_array(image, image_name(image)), image_name(image))
    return decode_file(read_file(image, rules), image_name(image))


def has_pixels(image: Any) -> bool:
    """Return whether an image is in memory, as a PIL image or an array, rather than a file."""
    return isinstance(image, Image.Image) or is_array(image)


def is_single(images: Any) -> bool:
    """Return whether this is one image rather than several; an array of four axes, or of paths, is several."""
    if is_array(images):
        return 2 <= len(images.shape) <= 3
    kinds = str, bytes, bytearray, memoryview, os.PathLike, Mapping, Image.Image, ImageFile
    return isinstance(images, kinds)


def image_name(image: Any) -> str:
    """Return what an image is called in messages: its path where it has one.

    Example:
        >>> image_name({"bytes": b"", "path": "shard/000.jpg"})
        "'shard/000.jpg'"
    """
    if isinstance(image, Mapping):
        return image_name(image["path"]) if image.get("path") else "bytes without a path"
    if isinstance(image, (str, os.PathLike)):
        return shortened(os.fspath(image))
    if is_array(image):
        return f"{type(image).__name__} of shape {tuple(image.shape)}"
    return f"{type(image).__name__}"


def shortened(address: str | bytes) -> str:
    """Return a path or URL in quotes, its middle left out where it is long."""
    half, rest = NAME_LENGTH // 2, len(address) - NAME_LENGTH
    # The name of a file stands at the end.
    return repr(address) if rest <= 0 else f"{address[:half]!r}... ({rest:,} more) ...{address[-half:]!r}"


def read_file(image: Any, rules: LinkRules | None = None) -> bytes:
    """Return the bytes of an image's file, however it is given; see `to_rgb`, also for the errors."""
    if isinstance(image, Mapping):
        if image.get("bytes") is None and not isinstance(image.get("path"), (str, os.PathLike)):
            raise GroundingTypeError(
                f'An image that is a mapping needs "bytes" or "path", got the keys {sorted(map(str, image))}.'
            )
        image = image["path"] if image.get("bytes") is None else image["bytes"]
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image)
    if isinstance(image, ImageFile):
        return _read_open_file(image)
    if isinstance(image, str):
        return _read_address(image, rules)
    if isinstance(image, os.PathLike):
        return _read_path(os.fspath(image))
    raise GroundingTypeError(
        f"An image must be a PIL image, a path, a URL, a file's bytes, a file object, an array or a tensor, got "
        f"{type(image).__name__}."
    )


def _read_address(address: str, rules: LinkRules | None) -> bytes:
    if address[:5].lower() == "data:":
        return _read_data_url(address)
    if address[:5].lower() == "file:":
        return _read_path(_path_of(address))
    found = SCHEME.match(address)
    if found is None:
        return _read_path(address)
    if found[1].lower() not in SCHEMES:
        raise GroundingValueError(
            f"The image {shortened(address)} has the scheme {found[1]!r}, and only file:, data:, http: and https: can "
            "be opened. Download it first, and pass the path."
        )
    try:
        return (rules or LinkRules()).fetch(address)
    except GroundingFileError as error:
        raise GroundingValueError(str(error)) from error


def _read_path(path: str | bytes) -> bytes:
    path = os.fsdecode(path)
    try:
        at_home = HOME.match(path) and not os.path.lexists(path)
        with open(os.path.expanduser(path) if at_home else path, "rb") as file:
            return file.read()
    except (OSError, ValueError, MemoryError) as error:  # ValueError: a null byte, or half a surrogate.
        if is_base64_image(path):
            return _from_base64(path) or b""
        reason = getattr(error, "strerror", None) or error
        raise GroundingValueError(f"The image {shortened(path)} cannot be opened: {reason}.") from error


def is_base64_image(text: str) -> bool:
    """Return whether a text is the base64 of an image's file."""
    return bool(BASE64.fullmatch(text)) and is_image(_from_base64(text) or b"")


def _path_of(url: str) -> str:
    """Return the path that a `file:` URL stands for."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise GroundingValueError(f"The image {shortened(url)} is no URL: {error}.") from error
    if parts.netloc.lower() not in ("", "localhost"):
        raise GroundingValueError(
            f"The image {shortened(url)} is on the host {parts.netloc!r}; a file: URL of this machine has three "
            "slashes, as in file:///home/me/cat.png."
        )
    # A path may hold ? and #, which urlsplit takes for the query and the fragment.
    return url2pathname(url[5:].removeprefix("//" + parts.netloc) if parts.netloc else re.sub("^//", "", url[5:]))


def _read_data_url(url: str) -> bytes:
    header, comma, text = url[5:].partition(",")
    data = _from_base64(unquote(text)) if header.lower().endswith(";base64") else unquote_to_bytes(text)
    if not comma or not data:
        raise GroundingValueError(
            f"The image {shortened(url)} is no data: URL of an image, data:image/png;base64,... with the file's bytes."
        )
    return data


def _from_base64(text: str) -> bytes | None:
    """Return what base64 of either alphabet stands for, with or without its padding; None where it is none."""
    text = re.sub(r"\s|=", "", text).translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:
        return None


def _read_open_file(file: Any) -> bytes:
    try:
        # As Pillow does: an image that was looked at before is at its end.
        if getattr(file, "seekable", lambda: hasattr(file, "seek"))():
            file.seek(0)
        data = file.read()
    except (OSError, ValueError, AttributeError, TypeError) as error:  # ValueError: it is closed.
        raise GroundingValueError(f"The file object {type(file).__name__} cannot be read: {error}.") from error
    if not isinstance(data, bytes):
        raise GroundingTypeError(
            f'The file object {type(file).__name__} gives {type(data).__name__}, not bytes. Open the file with "rb".'
        )
    return data
