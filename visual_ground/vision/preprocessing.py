"""`Preprocessing`: images become the tensors that one vision model reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from visual_ground.errors import GroundingTypeError
from visual_ground.vision.entry_point import parameter_names
from visual_ground.vision.images import ImageLike, to_rgb

# Where a processor keeps an image's own shape, images are made squares of at least this side first, so that they can
# be batched. Larger than the input of most encoders, so that little detail is lost.
SQUARE_SIDE = 512
# Processors that scale the short side to a few hundred pixels make gigabytes of an image of 5000 x 1. Panoramas are
# within this ratio of the long side to the short one; what is thinner is stretched, and shrunk, to it.
MAX_RATIO = 8
# Sides of 1 and 3 pixels are taken for colour channels by processors that look for these.
MIN_SIDE = 4


class Preprocessing:
    """An image processor, with what a model takes of its output; learned by processing a few grey images.

    Args:
        image_processor: maps a list of PIL images to `{"pixel_values": (n, c, h, w)}`.
        entry: what is called with pixels, as `entry_of` returns it.
        model_name: the model's class, for messages.

    Attributes:
        pixels_key: the name under which the processor returns pixels and the model takes them.
        square_side: the side of the squares that images are resized to first; None where the processor resizes them.
        extras: further inputs of the model that are the same for all images, (1, ...) each.

    Raises:
        GroundingTypeError: the model reads something else than pixels, or one image gives several entries.
    """

    def __init__(self, image_processor: Any, entry: Any, model_name: str) -> None:
        self.image_processor = image_processor
        self.square_side: int | None = None
        # A wide and a tall image of different areas show whether the output depends on an image's shape.
        wide, tall = (self._process([_grey(*size)]) for size in ((96, 64), (48, 80)))
        accepted = parameter_names(entry)
        self.pixels_key = self._find_pixels(wide, entry, accepted, model_name)
        inputs = {self.pixels_key, *(name for name in accepted if isinstance(wide.get(name), Tensor))}
        if any(wide[name].shape != tall[name].shape or self._varies(name, wide, tall) for name in inputs):
            self.square_side = SQUARE_SIDE
            pixels = self._process([_grey(64, 64)])[self.pixels_key]
            self.square_side = max(SQUARE_SIDE, pixels.shape[-1]) if pixels.dim() == 4 else SQUARE_SIDE
        processed = self._process([_grey(64, 64)])
        pixels = processed[self.pixels_key]
        if len(pixels) != 1 or pixels.dim() > 4:
            raise GroundingTypeError(
                f"{type(image_processor).__name__} makes {tuple(pixels.shape)} of one image: frames, tiles or loose "
                "patches, where (1, c, h, w) is needed. Pass an image_processor= that makes one entry per image."
            )
        self.extras: dict[str, Tensor] = {name: processed[name] for name in inputs - {self.pixels_key}}

    def __call__(self, images: Sequence[ImageLike]) -> Tensor:
        """Return pixels (n, c, h, w)."""
        pixels: Tensor = self._process([to_rgb(image) for image in images])[self.pixels_key]
        return pixels

    def model_inputs(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return the model's keyword arguments for pixels (n, c, h, w)."""
        extras = {
            name: value.to(pixels.device).expand(len(pixels), *value.shape[1:]) for name, value in self.extras.items()
        }
        return {self.pixels_key: pixels, **extras}

    def _find_pixels(self, processed: Any, entry: Any, accepted: set[str], model_name: str) -> str:
        main_input = getattr(entry, "main_input_name", "pixel_values")
        if "pixel_values" not in processed:
            if main_input in processed:
                return str(main_input)
            raise GroundingTypeError(
                f"{type(self.image_processor).__name__} gives {sorted(processed)}, and {model_name} reads "
                f'{main_input!r}. Pass an image_processor that maps a list of PIL images to {{"pixel_values": '
                "(n, c, h, w)}."
            )
        if main_input != "pixel_values" and hasattr(entry, "main_input_name") and "pixel_values" not in accepted:
            raise GroundingTypeError(
                f"{model_name} reads {main_input!r}, not pixels: it is no image encoder. Pass a model that maps "
                "pixel_values (n, c, h, w) to features, or the vision tower of this one."
            )
        return "pixel_values"

    def _varies(self, name: str, wide: Any, tall: Any) -> bool:
        """Return whether an input that goes with the pixels depends on the image's shape."""
        return name != self.pixels_key and not torch.equal(wide[name], tall[name])

    def _process(self, images: list[Image.Image]) -> Any:
        images = [self._resized(image) for image in images]
        return self.image_processor(images, return_tensors="pt")

    def _resized(self, image: Image.Image) -> Image.Image:
        size = bounded_size(*image.size) if self.square_side is None else (self.square_side, self.square_side)
        return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def bounded_size(width: int, height: int) -> tuple[int, int]:
    """Return the size at which an image reaches its processor: its own, unless it is very thin.

    The short side is stretched, but to no more than `SQUARE_SIDE`, and the long side is then shrunk, until their ratio
    is at most `MAX_RATIO`; no side is left below `MIN_SIDE`. So the picture is squeezed, and none of it cut away.

    Example:
        >>> bounded_size(640, 480), bounded_size(5000, 1), bounded_size(1, 20), bounded_size(90_000, 600)
        ((640, 480), (4096, 512), (4, 20), (4800, 600))
    """
    short, long = sorted((width, height))
    short = max(short, min(-(-long // MAX_RATIO), SQUARE_SIDE), MIN_SIDE)
    long = max(min(long, short * MAX_RATIO), MIN_SIDE)
    return (long, short) if width >= height else (short, long)


class TransformProcessor:
    """A per-image transform to pixels (c, h, w), of open_clip or timm, as an image processor of transformers."""

    def __init__(self, transform: Callable[[Image.Image], Tensor]) -> None:
        self.transform = transform

    def __call__(self, images: Sequence[Image.Image], return_tensors: str = "pt") -> dict[str, Tensor]:
        """Return `{"pixel_values": (n, c, h, w)}`."""
        return {"pixel_values": torch.stack([self.transform(image) for image in images])}


def _grey(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (128, 128, 128))
