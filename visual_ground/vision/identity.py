"""How images and vision encoders are recognised: by hashes of their content."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from PIL import Image

from visual_ground.vision.encoder import VisionEncoder
from visual_ground.vision.images import ImageLike, has_pixels, read_file, to_rgb


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
    """Return 16 hex digits that stand for an encoder: its layers, weights, buffers and preprocessing.

    Args:
        vision: the encoder. Its preprocessing is recognised by the pixels that it makes of one small gradient.
    """
    digest = hashlib.sha256()
    if vision.num_patch_tokens:
        digest.update(f"parts:{vision.num_patch_tokens};".encode())
    # The kinds of layers count too: a ReLU and a Tanh have the same weights, namely none.
    for name, module in vision.named_modules():
        digest.update(f"{name}:{type(module).__name__};".encode())
    across, down = np.meshgrid(np.linspace(0, 255, 96), np.linspace(0, 255, 64))
    gradient = Image.fromarray(np.stack([across, down, (across + down) / 2], axis=-1).astype(np.uint8))
    tensors = {
        "pixels": vision.preprocess([gradient]),
        **dict(vision.named_buffers()),
        **dict(vision.named_parameters()),
    }
    for name, tensor in tensors.items():
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
