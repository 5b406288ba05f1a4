"""Files and PIL images become upright 8-bit RGB; whatever Pillow raises becomes one error."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from visual_ground.errors import GroundingError, GroundingValueError
from visual_ground.vision.arrays import scale_to_bytes
from visual_ground.vision.formats import File, open_image

# The orientation of a photo in EXIF, and what turns each upright.
ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow starts Ghostscript for these, with whatever a stranger has written into them.
DRAWN_BY_PROGRAMS = ("EPS",)
TRANSPARENT_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
JPEG_QUALITY = 85  # Of thumbnails.
BITS_PER_SAMPLE = 258  # A TIFF tag.


def decode_file(data: bytes, name: str) -> Image.Image:
    """Return the bytes of an image's file as upright RGB; `name` is for messages.

    Raises:
        GroundingValueError: not an image, damaged, truncated, without pixels, over Pillow's decompression limit, or of
            a kind that Pillow leaves to another program.
    """
    try:
        opened = open_image(data)
    except UnidentifiedImageError as error:
        raise GroundingValueError(f"{name} is not an image that Pillow can read.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, error) from error
    except Exception as error:  # Plugins raise errors of any kind for a damaged header.
        raise _damaged(name, error) from error
    with opened:
        if opened.format in DRAWN_BY_PROGRAMS:
            raise GroundingValueError(
                f"{name} is not an image that Pillow can read by itself: it is {opened.format}, which another program "
                "would have to draw. Save it as PNG."
            )
        limit = Image.MAX_IMAGE_PIXELS
        # Pillow itself only warns at its limit, and raises at twice as much.
        if limit is not None and opened.width * opened.height > limit:
            raise _too_large(name, f"{opened.width} x {opened.height} pixels, more than {limit}.")
        return decode(opened, name)


def decode(image: Image.Image, name: str) -> Image.Image:
    """Return a PIL image of any mode as upright RGB, transparency as white; `name` is for messages.

    Nothing but the pixels is kept: neither EXIF nor a colour profile, which would no longer fit them.

    Raises:
        GroundingValueError: without pixels, damaged, closed, or numbers outside the range of their mode.
    """
    if 0 in image.size:
        raise GroundingValueError(f"The image {name} has no pixels: its size is {image.size}.")
    try:
        image.load()
        pixels = _upright(_eight_bits(image, name), image)
    except GroundingError:
        raise
    except Exception as error:  # Decoders raise errors of any kind for damaged files.
        raise _damaged(name, error) from error
    pixels.info = {}
    return pixels


def to_thumbnail(image: Image.Image, size: int) -> bytes:
    """Return a JPEG file of an image made to fit into a square of `size` pixels."""
    small = image.convert("RGB")
    small.thumbnail((size, size))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def to_png(image: Image.Image) -> bytes:
    """Return a PNG file of an image."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def is_image(data: File) -> bool:
    """Return whether a path, or bytes, is an image by its content, as far as its header tells."""
    try:
        with open_image(data) as image:
            return min(image.size) > 0
    except Exception:  # Whatever it is, it is no image.
        return False


def _upright(pixels: Image.Image, image: Image.Image) -> Image.Image:
    """Return pixels turned as the EXIF of the image says that they were made of."""
    try:
        # ImageOps.exif_transpose would write the EXIF anew, which fails if any other entry of it is damaged.
        way = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # A picture whose EXIF is damaged is shown as it lies.
        return pixels
    return pixels if way is None else pixels.transpose(way)


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(scale_to_bytes(np.asarray(image), _white(image), name)).convert("RGB")
    if image.mode in TRANSPARENT_MODES or "transparency" in image.info:
        # Pillow turns La, grey with premultiplied alpha, into LA only.
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(background, image).convert("RGB")
    return image.convert("RGB")


def _white(image: Image.Image) -> int:
    """Return what is white in a deep image: by its mode, never by its content."""
    if image.mode == "F":
        return 1
    # Pillow unpacks TIFF's 12 bits into 16 without scaling them; PNG, PGM and JPEG 2000 come scaled.
    bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE)
    return 4095 if bits in (12, (12,)) else 65535


def _too_large(name: str, why: object) -> GroundingValueError:
    return GroundingValueError(
        f"The image {name} is too large: {why} Scale it down, or load it yourself and pass the PIL image."
    )


def _damaged(name: str, error: Exception) -> GroundingValueError:
    reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return GroundingValueError(
        f"The image {name} is damaged or truncated, closed, or of a kind that Pillow cannot decode ({reason}). Save it "
        "again, or leave it out."
    )
