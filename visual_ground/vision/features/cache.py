"""`FeatureCache`: image features, computed once and kept on disk, in one folder per encoder (see `feature_store`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from visual_ground.errors import GroundingError, GroundingValueError
from visual_ground.progress import counted
from visual_ground.vision.decoding import decode_file
from visual_ground.vision.encoder import VisionEncoder, evaluating
from visual_ground.vision.features.store import FEATURES_FILE, STORED, FeatureFile
from visual_ground.vision.identity import encoder_fingerprint, file_key, image_key
from visual_ground.vision.images import ImageLike, has_pixels, image_name, read_file

UNREADABLE = -1  # The row number of an image that cannot be read.


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

    def __init__(self, folder: str | os.PathLike[str], vision: VisionEncoder) -> None:
        self.vision, self.feature_dim = vision, vision.feature_dim
        fingerprint = encoder_fingerprint(vision)
        if (Path(folder) / FEATURES_FILE).is_file():
            raise GroundingValueError(
                f"{os.fspath(folder)!r} holds the features of one encoder, {Path(folder).name!r}; this model's encoder "
                f"is {fingerprint!r}. Give the folder above it, which has a folder for each encoder."
            )
        self.folder = Path(folder) / fingerprint
        self.file = FeatureFile(self.folder, self.feature_dim)

    def __len__(self) -> int:
        self.file.refresh()
        return len(self.file.rows)

    def features(self, images: Sequence[ImageLike], batch_size: int = 32, progress: bool = False) -> Tensor:
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
        """Return the rows of the file that hold the features of images; missing ones are computed and written.

        Images are encoded in the order given and written batch by batch, so a run that was killed computes, when it
        starts again, the same batches as one that was not, to the bit.

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
        batch, rows, read_images = _Batch(), list[int](), self._read_images(images, workers)
        for position, image in enumerate(counted(read_images, "features", "images", progress)):
            if image.error is not None:
                if refuse is None:
                    raise type(image.error)(f"images[{position}]: {image.error}") from image.error
                refuse(position, image.error)
            rows.append(self.file.rows.get(image.key, UNREADABLE))
            if image.error is None and rows[-1] == UNREADABLE:
                batch.add(position, image)
            if len(batch.pixels) == batch_size:
                self._write(batch, rows)
                batch = _Batch()
        self._write(batch, rows)
        return np.array(rows, dtype=np.int64)

    def _read_images(self, images: Any, workers: int) -> Iterable[_ReadImage]:
        # Workers get the preprocessing alone, so that no copy of the encoder's weights is sent to them.
        read = _Reader(self.vision.preprocessing, self.file.rows)
        dataset: Dataset[_ReadImage] = _Stream(images, read)
        if hasattr(images, "__getitem__"):
            dataset = _ByNumber(images, read)
        return DataLoader(dataset, batch_size=None, num_workers=workers)

    def _write(self, batch: _Batch, rows: list[int]) -> None:
        """Compute and write what the file still lacks of a batch, and fill in its rows."""
        self.file.refresh()
        missing = {key: pixels for key, pixels in batch.pixels.items() if key not in self.file.rows}
        if missing:
            # Encoding holds no lock, so that processes with different images do not wait for each other.
            self.file.add(dict(zip(missing, self._encode(missing, batch.names), strict=True)))
        for position, key in batch.keys.items():
            rows[position] = self.file.rows[key]

    def _encode(self, pixels: Mapping[str, Tensor], names: Mapping[str, str]) -> np.ndarray:
        """Return the features (n, f) of pixels by key as float16."""
        with evaluating(self.vision.model):
            features = self.vision(torch.stack(list(pixels.values()))).float().cpu()
        expected = len(pixels), self.feature_dim
        if features.shape != expected:
            raise GroundingValueError(f"The encoder must give features {expected}, got {tuple(features.shape)}.")
        rounded = features.half()
        for key, row, exact in zip(pixels, rounded, features, strict=True):
            if not torch.isfinite(row).all():
                raise GroundingValueError(
                    f"The features of {names[key]} reach {exact.abs().max():.3g}, which is not finite in float16, and "
                    "the cache holds float16. Use this encoder without a cache, or scale its output down."
                )
        stored: np.ndarray = rounded.numpy().astype(STORED)
        return stored


@dataclass
class _ReadImage:
    """One image as a worker hands it over; pixels (c, h, w) only where the file lacks its features."""

    key: str = ""
    name: str = ""
    pixels: Tensor | None = None
    error: GroundingError | None = None


class _Batch:
    """Images that wait to be encoded: the key of each position, and each key's pixels and name for messages."""

    def __init__(self) -> None:
        self.keys: dict[int, str] = {}
        self.pixels: dict[str, Tensor] = {}
        self.names: dict[str, str] = {}

    def add(self, position: int, image: _ReadImage) -> None:
        """Add an image; one picture that comes several times is encoded once."""
        self.keys[position] = image.key
        if image.key not in self.pixels:
            assert image.pixels is not None, "an image that the file lacks was decoded"
            self.pixels[image.key], self.names[image.key] = image.pixels, f"images[{position}], {image.name},"


class _Reader:
    """Reads an image, and decodes and preprocesses it where the file lacks its features."""

    def __init__(self, preprocess: Callable[[Sequence[ImageLike]], Tensor], known: Collection[str]) -> None:
        self.preprocess, self.known = preprocess, known

    def __call__(self, image: Any) -> _ReadImage:
        """Return the image read; an error in its place stays one."""
        if isinstance(image, GroundingError):
            return _ReadImage(error=image)
        try:
            if has_pixels(image):
                key = image_key(image)
                return _ReadImage(key, "an image", None if key in self.known else self.preprocess([image])[0])
            data, name = read_file(image), image_name(image)
            key = file_key(data)
            pixels = None if key in self.known else self.preprocess([decode_file(data, name)])[0]
            return _ReadImage(key, name, pixels)
        except GroundingError as error:
            return _ReadImage(error=error)


class _ByNumber(Dataset[_ReadImage]):
    """Images by number."""

    def __init__(self, images: Any, read: _Reader) -> None:
        self.images, self.read = images, read

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> _ReadImage:
        return self.read(self.images[number])


class _Stream(IterableDataset[_ReadImage]):
    """Images that come one after the other."""

    def __init__(self, images: Any, read: _Reader) -> None:
        self.images, self.read = images, read

    def __iter__(self) -> Iterator[_ReadImage]:
        return map(self.read, self.images)
