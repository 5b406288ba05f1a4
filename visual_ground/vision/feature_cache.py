"""FreezeGuard image features, computed once and kept on disk, in one folder per encoder (see `feature_file`)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm

from visual_ground.errors import GroundingError, GroundingValueError
from visual_ground.vision.encoder import VisionEncoder
from visual_ground.vision.feature_store import FEATURES_FILE, STORED, FeatureFile
from visual_ground.vision.images import decode_file, image_name, read_file, to_rgb

UNREADABLE = -1


def image_key(image: Any) -> str:
    """Return the name of an image's content: the SHA-256 of its file, or of a PIL image's size and RGB bytes.

    A file need not be decoded to be known. The same picture as a file and as a PIL image has two keys.

    Args:
        image: a PIL image, a path, or `{"bytes": ..., "path": ...}`.

    Raises:
        GroundingError: as in `visual_ground.vision.images.to_rgb`.

    Example:
        >>> image_key(Image.new("L", (2, 2))) == image_key(Image.new("RGB", (2, 2)))
        True
        >>> image_key(Image.new("L", (2, 2))) == image_key(Image.new("L", (4, 1)))
        False
    """
    if isinstance(image, Image.Image):
        rgb = to_rgb(image)
        return hashlib.sha256(f"{rgb.width}x{rgb.height}:".encode() + rgb.tobytes()).hexdigest()
    return hashlib.sha256(read_file(image)).hexdigest()


def fingerprint(vision: VisionEncoder) -> str:
    """Return 16 hex digits that stand for an encoder: its layers, weights, buffers and preprocessing.

    Args:
        vision: the encoder. Its preprocessing is known by the pixels that it makes of one small gradient.
    """
    digest = hashlib.sha256()
    # The kinds of layers count too: a ReLU and a Tanh have the same weights, namely none.
    if vision.num_patch_tokens:
        digest.update(f"parts:{vision.num_patch_tokens};".encode())
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


class FeatureCache:
    """The features of one frozen encoder, kept on disk as float16 and shared by all processes that use the folder.

    The encoder is recognised when the cache is opened; its weights must not change afterwards. `len(cache)` is how many
    images the folder has by now, and `feature_dim` is f. Empty the folder only while nobody uses it.

    Args:
        folder: where caches are kept; each encoder has a subfolder of its own, named by its fingerprint.
        vision: the encoder.

    Raises:
        GroundingValueError: the folder itself holds the features of one encoder.

    Example:
        >>> cache = FeatureCache("features", vision)  # doctest: +SKIP
        >>> cache.features(["cat.png", "dog.png"]).shape  # doctest: +SKIP
        torch.Size([2, 768])
    """

    key = staticmethod(image_key)

    def __init__(self, folder: str | os.PathLike, vision: VisionEncoder) -> None:
        self.vision, self.feature_dim, mark = vision, vision.feature_dim, fingerprint(vision)
        if (Path(folder) / FEATURES_FILE).is_file():
            raise GroundingValueError(
                f"{os.fspath(folder)!r} holds the features of one encoder, {Path(folder).name!r}; this model's encoder "
                f"is {mark!r}. Give the folder above it, which has a folder for each encoder."
            )
        self.folder = Path(folder) / mark
        self.file = FeatureFile(self.folder, self.feature_dim)

    def __len__(self) -> int:
        self.file.refresh()
        return len(self.file.rows)

    def features(self, images: Sequence[Any], batch_size: int = 32, progress: bool = False) -> Tensor:
        """Return the features of images, in order; only those that the cache lacks are computed.

        No more than `batch_size` images are held at once.

        Args:
            images: n PIL images or paths; one picture may come several times.
            batch_size: images encoded, and written, at once.
            progress: show a progress bar.

        Returns:
            (n, f) float32 on the CPU: what the encoder gives, rounded to float16.

        Raises:
            GroundingValueError: an image that cannot be read, features that float16 cannot hold, or batch_size below 1.
                The batches before it are kept.
            GroundingTypeError: an entry that is neither an image nor a path.
            GroundingFileError: the disk is full.
        """
        if batch_size < 1:
            raise GroundingValueError(f"batch_size must be at least 1, got {batch_size}.")
        return self.file.read(self.place(images, batch_size, progress=progress))

    def place(
        self,
        images: Iterable[Any],
        batch_size: int = 32,
        workers: int = 0,
        progress: bool = False,
        refuse: Callable[[int, GroundingError], None] | None = None,
    ) -> np.ndarray:
        """Return in which rows of the file the features of images are; those that it lacks are computed and written.

        Images are encoded in the order given and written batch by batch, so a run that was killed and starts again
        computes the same batches as one that was not, to the bit.

        Args:
            images: a sequence, or a stream that is read once, of PIL images, paths, or `{"bytes": ..., "path": ...}`.
            batch_size: images encoded, and written, at once.
            workers: processes that read and decode.
            progress: show a progress bar.
            refuse: called with the position and the error of an image that cannot be read, which then gets row -1;
                where None the error is raised.

        Returns:
            (n,) int64.
        """
        self.file.refresh()
        kind = _Sequence if hasattr(images, "__getitem__") else _Stream
        pictures = DataLoader(kind(images, self), batch_size=None, num_workers=workers)
        rows: list[int] = []
        waiting: dict[str, tuple[str, Tensor]] = {}
        unknown: list[tuple[int, str]] = []
        for position, found in enumerate(tqdm(pictures, desc="features", unit="image", disable=not progress)):
            if found.error is not None:
                if refuse is None:
                    raise type(found.error)(f"images[{position}]: {found.error}") from found.error
                refuse(position, found.error)
            rows.append(self.file.rows.get(found.key, UNREADABLE))
            if found.error is None and rows[-1] == UNREADABLE:
                unknown.append((position, found.key))
                waiting.setdefault(found.key, (f"images[{position}], {found.name},", found.pixels))
            if len(waiting) == batch_size:
                self._add(waiting, rows, unknown)
        self._add(waiting, rows, unknown)
        return np.array(rows, dtype=np.int64)

    def _add(self, waiting: dict[str, tuple[str, Tensor]], rows: list[int], unknown: list[tuple[int, str]]) -> None:
        """Compute and write what is still missing of `waiting`, fill in the `unknown` of `rows`, and clear both."""
        self.file.refresh()
        missing = {key: value for key, value in waiting.items() if key not in self.file.rows}
        if missing:
            # Encoding holds no lock, so that processes with different images do not wait for each other.
            self.file.add(dict(zip(missing, self._encode(missing), strict=True)))
        for position, key in unknown:
            rows[position] = self.file.rows[key]
        waiting.clear()
        unknown.clear()

    @torch.no_grad()
    def _encode(self, missing: Mapping[str, tuple[str, Tensor]]) -> np.ndarray:
        """Return the features (n, f) of named pixels as float16."""
        model, names = self.vision.model, [name for name, _ in missing.values()]
        was_training = model.training
        model.eval()
        try:
            features = self.vision(torch.stack([pixels for _, pixels in missing.values()])).float().cpu()
        finally:
            model.train(was_training)
        if features.shape != (len(names), self.feature_dim):
            expected = len(names), self.feature_dim
            raise GroundingValueError(f"The encoder must give features {expected}, got {tuple(features.shape)}.")
        rounded = features.half()
        for name, row, exact in zip(names, rounded, features, strict=True):
            if not torch.isfinite(row).all():
                raise GroundingValueError(
                    f"The features of {name} reach {exact.abs().max():.3g}, which is not finite in float16, and the "
                    "cache holds float16. Use this encoder without a cache, or scale its output down."
                )
        return rounded.numpy().astype(STORED)


@dataclass
class _Found:
    """One image as a worker hands it over; pixels (c, h, w) only where the file lacks its features."""

    key: str = ""
    name: str = ""
    pixels: Tensor | None = None
    error: GroundingError | None = None


class _Sequence(TorchDataset):
    """Images by number, read, keyed and, where the cache lacks them, decoded and preprocessed."""

    def __init__(self, images: Any, cache: FeatureCache) -> None:
        self.images, self.rows = images, cache.file.rows
        self.preprocess = cache.vision.preprocess

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> _Found:
        return self.look(self.images[number])

    def look(self, image: Any) -> _Found:
        """Read one image; an error in its place stays one."""
        if isinstance(image, GroundingError):
            return _Found(error=image)
        try:
            if isinstance(image, Image.Image):
                image, key = to_rgb(image), image_key(image)
                return _Found(key, "an image", None if key in self.rows else self.preprocess([image])[0])
            data, name = read_file(image), image_name(image)
            key = hashlib.sha256(data).hexdigest()
            return _Found(key, name, None if key in self.rows else self.preprocess([decode_file(data, name)])[0])
        except GroundingError as error:
            return _Found(error=error)


class _Stream(_Sequence, IterableDataset):
    """The same for images that come one after the other."""

    def __iter__(self):
        return map(self.look, self.images)
