"""What an index's build needs of a model, how it is done, and what it did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from visual_ground.errors import GroundingValueError
from visual_ground.index.captions import check_weight
from visual_ground.vision.encoder import VisionEncoder
from visual_ground.vision.identity import ImageSpace


class PixelEmbedder(Protocol):
    """What `build_index` needs of a model, as `GroundedModel` has it."""

    @property
    def vision(self) -> VisionEncoder:
        """The encoder."""

    @property
    def image_space(self) -> ImageSpace:
        """Which vectors it gives to images."""

    def embed_images(self, *, image_features: Tensor) -> Tensor:
        """Map features (n, f) to unit vectors (n, q)."""

    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """Map texts to unit vectors (n, q); called only with a `caption_weight`."""


@dataclass(frozen=True)
class BuildOptions:
    """How an index is built.

    Args:
        batch_size: images that the encoder runs at once.
        workers: processes that read images; 0 for this one.
        thumbnail_size: the side in pixels of thumbnails that the index keeps; None for none.
        half: keep vectors as float16, half as large.
        part_size: images in a part, which is lost when the build is stopped before it is done; a multiple of batch_size
            is used.
        shard: (i, n) builds every n-th image from the i-th on, so that n processes build n indexes that can be merged;
            (0, 1) all images in this process. If None, processes that `accelerate launch` started share them.
        progress: show a progress bar.
        caption_weight: w, from 0 to 1; the vector of an image with a caption is (1 - w) times its own and w times its
            caption's, scaled to length 1.

    Raises:
        GroundingValueError: a number out of its range.
    """

    batch_size: int = 32
    workers: int = 0
    thumbnail_size: int | None = None
    half: bool = False
    part_size: int = 2048
    shard: tuple[int, int] | None = None
    progress: bool = True
    caption_weight: float = 0.0

    def __post_init__(self) -> None:
        for name, least in {"batch_size": 1, "part_size": 1, "thumbnail_size": 1, "workers": 0}.items():
            value = getattr(self, name)
            if value is None and name == "thumbnail_size":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise GroundingValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
        if self.shard is not None and not 0 <= self.shard[0] < self.shard[1]:
            raise GroundingValueError(f"shard must be (i, n) with 0 <= i < n, got {self.shard}.")
        check_weight(self.caption_weight)


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    Args:
        num_images: images in the index.
        unreadable: names of those that are not, and why.
        images_per_second: of this run; what an earlier run had done is not counted.
    """

    num_images: int
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    images_per_second: float = 0.0
