"""How images, vision encoders and spaces of image vectors are recognised."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from visual_ground.errors import GroundingFileError
from visual_ground.storage.hub_names import is_hub_name
from visual_ground.vision.encoder import VisionEncoder
from visual_ground.vision.images import ImageLike, has_pixels, read_file, to_rgb

# The same encoder in half precision, or on another device, moves a vector by less; another image layer by far more.
LEAST_COSINE = 0.98
# What two pictures differ in is compared too, since many spaces hold all their vectors in one narrow cone.
LEAST_COSINE_OF_DIFFERENCE, LEAST_DIFFERENCE = 0.9, 0.1


@dataclass(frozen=True)
class ImageSpace:
    """Which vectors a model gives to images, recognised by those of two fixed pictures; what made it, by name.

    Args:
        vectors: of `reference_pictures`, two of q numbers.
        vision_encoder: the name of the encoder, if it has one.
        adapter: the folder or Hub id of the adapter, if it was loaded from one.
    """

    vectors: tuple[tuple[float, ...], ...]
    vision_encoder: str | None = None
    adapter: str | None = None

    @classmethod
    def of(cls, vectors: Tensor, vision_encoder: str | None = None, adapter: str | None = None) -> ImageSpace:
        """Make one of the vectors (2, q) of `reference_pictures`."""
        rows = [[round(value, 4) for value in row] for row in vectors.float().cpu().tolist()]
        return cls(tuple(map(tuple, rows)), vision_encoder, adapter)

    def is_same(self, other: ImageSpace) -> bool:
        """Return whether vectors of this space can be compared with those of another."""
        ours, theirs = torch.tensor(self.vectors), torch.tensor(other.vectors)
        if ours.shape != theirs.shape or not bool((F.cosine_similarity(ours, theirs) >= LEAST_COSINE).all()):
            return False
        ours, theirs = ours[0] - ours[1], theirs[0] - theirs[1]
        if min(float(ours.norm()), float(theirs.norm())) < LEAST_DIFFERENCE:
            return True
        return float(F.cosine_similarity(ours, theirs, dim=0)) >= LEAST_COSINE_OF_DIFFERENCE

    def __str__(self) -> str:
        adapter = "an adapter that was not loaded from a folder" if self.adapter is None else repr(self.adapter)
        encoder = "an encoder without a name" if self.vision_encoder is None else repr(self.vision_encoder)
        return f"{adapter} with {encoder}"

    def published(self) -> ImageSpace:
        """Return it without the names of local folders."""
        names = [name if name and is_hub_name(name) else None for name in (self.vision_encoder, self.adapter)]
        return ImageSpace(self.vectors, *names)

    def to_dict(self) -> dict[str, Any]:
        """Return it fit for JSON."""
        vectors = [list(row) for row in self.vectors]
        return {"vectors": vectors, "vision_encoder": self.vision_encoder, "adapter": self.adapter}

    @classmethod
    def from_dict(cls, values: Any, dim: int) -> ImageSpace:
        """Read what `to_dict` returned, of vectors of width `dim`; a GroundingFileError where it is damaged."""
        try:
            space = cls(tuple(tuple(map(float, row)) for row in values["vectors"]), **_names(values))
        except (TypeError, ValueError, KeyError) as error:
            raise GroundingFileError(f"The image space is damaged ({type(error).__name__}: {error}).") from error
        is_whole = len(space.vectors) == 2 and all(len(row) == dim for row in space.vectors)
        if not is_whole or not all(math.isfinite(value) for row in space.vectors for value in row):
            raise GroundingFileError(f"The image space is damaged: it must hold two vectors of {dim} numbers.")
        return space


def _names(values: Mapping[str, Any]) -> dict[str, str | None]:
    names = {key: value for key, value in values.items() if key != "vectors"}
    if wrong := [value for value in names.values() if not (value is None or isinstance(value, str))]:
        raise TypeError(f"{wrong} are no names")
    return names


def reference_pictures() -> list[Image.Image]:
    """Return the two pictures by which an `ImageSpace` is recognised, which look as different as they can."""
    across, down = np.meshgrid(np.arange(96), np.arange(64))
    discs = ((across % 32 - 16) ** 2 + (down % 32 - 16) ** 2 < 120)[..., None] * np.array([230, 40, 40])
    return [_gradient(), Image.fromarray(np.where(discs > 0, discs, 255).astype(np.uint8))]


def _gradient() -> Image.Image:
    across, down = np.meshgrid(np.linspace(0, 255, 96), np.linspace(0, 255, 64))
    return Image.fromarray(np.stack([across, down, (across + down) / 2], axis=-1).astype(np.uint8))


def image_key(image: ImageLike) -> str:
    """Return the key of an image's content: the SHA-256 of its file, or of size and RGB bytes
    where it is a PIL image or an array.

    A file has a key without being decoded. The same picture as a file and as a PIL image has two keys.

    Args:
        image: as in `visual_ground.vision.images.to_rgb`.

    Raises:
        GroundingError: as in `visual_ground.vision.images.to_rgb`.

    Example:
        >>> image_key(Image.new("L", (2, 2))) == image_key(Image.new("RGB", (2, 2)))
        True
        >>> image_key(Image.new("L", (2, 2))) == image_key(Image.new("L", (4, 1)))
        False
    """
    if has_pixels(image):
        rgb = to_rgb(image)
        return hashlib.sha256(f"{rgb.width}x{rgb.height}:".encode() + rgb.tobytes()).hexdigest()
    return file_key(read_file(image))


def file_key(data: bytes) -> str:
    """Return the key of an image's file, as `image_key` does, from its bytes."""
    return hashlib.sha256(data).hexdigest()


def encoder_fingerprint(vision: VisionEncoder) -> str:
    """Return 16 hex digits for an encoder: layers, weights, buffers, and the pixels it makes of a small gradient."""
    digest = hashlib.sha256()
    if vision.num_patch_tokens:
        digest.update(f"parts:{vision.num_patch_tokens};".encode())
    # The kinds of layers count too: a ReLU and a Tanh have the same weights, namely none.
    for name, module in vision.named_modules():
        digest.update(f"{name}:{type(module).__name__};".encode())
    tensors = {
        "pixels": vision.preprocess([_gradient()]),
        **dict(vision.named_buffers()),
        **dict(vision.named_parameters()),
    }
    for name, tensor in tensors.items():
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
