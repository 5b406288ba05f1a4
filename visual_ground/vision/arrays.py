"""Arrays of pixels become 8-bit pictures; the scale follows from the kind of number, never from what is in the picture.

| numbers | black | white |
|---|---|---|
| bool | False | True |
| 8-bit, and signed, 32-bit or 64-bit whole numbers | 0 | 255 |
| unsigned 16-bit | 0 | 65535 |
| floats | 0.0 | 1.0 |
"""

from __future__ import annotations

from typing import Any, TypeGuard

import numpy as np
from PIL import Image
from torch import Tensor

from visual_ground.errors import GroundingTypeError, GroundingValueError

# Resizing with bicubic or Lanczos filters overshoots black and white by about a tenth; what is further out is in other
# units: 0 to 255, -1 to 1, or normalised by a mean and a standard deviation.
OVERSHOOT = 0.25


def is_array(image: Any) -> TypeGuard[Any]:
    """Return whether an object is an array or tensor of pixels."""
    if isinstance(image, (Tensor, np.ndarray)):
        return True
    # Arrays of other libraries; a NumPy number or a PIL image has this method too.
    return hasattr(image, "__array__") and bool(getattr(image, "shape", ())) and not isinstance(image, Image.Image)


def from_array(array: Any, name: str) -> Image.Image:
    """Return an array of pixels as a picture of mode L, LA, RGB or RGBA.

    Args:
        array: (h, w), (h, w, channels) or (channels, h, w), with 1, 3 or 4 channels (2, grey and alpha, only as the
            last axis). Where both axes could be the channels, a tensor's are the first and an array's are the last.
        name: for messages.

    Raises:
        GroundingTypeError: numbers of a kind that no picture has.
        GroundingValueError: another shape, or numbers outside the range of their kind.

    Example:
        >>> from_array(np.full((2, 2), 65535, np.uint16), "deep").getpixel((0, 0))
        255
    """
    values = _as_numpy(array, name)
    if values.ndim not in (2, 3):
        raise _wrong_shape(values, name)
    if values.ndim == 3:
        values = _channels_last(values, prefers_first=isinstance(array, Tensor), name=name)
    if 0 in values.shape:
        raise GroundingValueError(f"The image {name} has no pixels: its shape is {values.shape}.")
    return Image.fromarray(np.ascontiguousarray(scale_to_bytes(values, _white(values, name), name)))


def scale_to_bytes(values: np.ndarray, white: int, name: str) -> np.ndarray:
    """Map numbers from 0 to `white` to 0 to 255; numbers far outside, of unknown scale, raise GroundingValueError.

    NaN becomes black, and infinities black and white. Floats may overshoot a little, and are cut.
    """
    if values.dtype == np.uint8 and white == 255:
        return values
    slack = OVERSHOOT if values.dtype.kind == "f" else 0
    with np.errstate(invalid="ignore"):
        numbers = np.nan_to_num(values.astype(np.float64), nan=0, posinf=white, neginf=0)
    low, high = numbers.min(), numbers.max()
    if low < -slack * white or high > white * (1 + slack):
        raise GroundingValueError(
            f"The image {name} has numbers from {low:.6g} to {high:.6g}, and 0 is black and {white} is white for "
            f"{values.dtype} numbers. Scale them to this range, or convert the image to 8 bits (numpy.uint8)."
        )
    scaled: np.ndarray = np.clip(numbers * (255 / white), 0, 255).round().astype(np.uint8)
    return scaled


def _as_numpy(array: Any, name: str) -> np.ndarray:
    try:
        if isinstance(array, Tensor):
            tensor = array.detach().cpu()
            # NumPy has no bfloat16.
            return np.asarray((tensor.float() if tensor.is_floating_point() else tensor).numpy())
        return np.asarray(array)
    except Exception as error:  # Sparse and quantised tensors, arrays on other devices: each raises errors of its own.
        raise GroundingTypeError(f"{name} cannot be read as an array ({error}). Pass a numpy.ndarray.") from error


def _white(values: np.ndarray, name: str) -> int:
    kind = values.dtype.kind
    if kind not in "buif":
        raise GroundingTypeError(f"{name} holds {values.dtype}, and pixels are whole numbers, floats or bools.")
    return 1 if kind in "bf" else 65535 if values.dtype.str[1:] == "u2" else 255


def _channels_last(values: np.ndarray, prefers_first: bool, name: str) -> np.ndarray:
    first, last = values.shape[0] in (1, 3, 4), values.shape[-1] in (1, 3, 4)
    if not last and not first and values.shape[-1] != 2:
        raise _wrong_shape(values, name)
    if first and (prefers_first or not last):
        values = np.moveaxis(values, 0, -1)
    return values[..., 0] if values.shape[-1] == 1 else values


def _wrong_shape(values: np.ndarray, name: str) -> GroundingValueError:
    return GroundingValueError(
        f"{name} is no picture: a picture is (h, w), (h, w, channels) or (channels, h, w) with 1, 3 or 4 channels, and "
        f"this has the shape {values.shape}. Pass the pictures of a batch as a list."
    )
