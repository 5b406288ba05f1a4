"""Frozen image features, computed once and kept on disk.

One folder holds the features of one encoder:

    FOLDER/FINGERPRINT/features.f16   rows of f little-endian float16 numbers, only ever appended
    FOLDER/FINGERPRINT/index.jsonl    {"row": R, "keys": [...]} per batch: row R + i belongs to keys[i]
    FOLDER/FINGERPRINT/lock           held by the process that reads or writes the index

A batch counts from the moment that its line in the index is whole. Its rows are on disk before that line is begun, so
a process that is killed loses its last batch at most, and what it left is cut off before the next one is written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from visual_ground.errors import GroundingError, GroundingValueError
from visual_ground.images import to_rgb
from visual_ground.vision import VisionEncoder

FEATURES_FILE = "features.f16"
INDEX_FILE = "index.jsonl"
LOCK_FILE = "lock"
STORED = np.dtype("<f2")


def image_key(image: Image.Image | str | os.PathLike) -> str:
    """Return the name of an image's content: the SHA-256 of its size and its RGB bytes.

    Args:
        image: a PIL image or a path; the same picture has the same key either way.

    Raises:
        GroundingError: as in `visual_ground.images.to_rgb`.

    Example:
        >>> image_key(Image.new("L", (2, 2))) == image_key(Image.new("RGB", (2, 2)))
        True
        >>> image_key(Image.new("L", (2, 2))) == image_key(Image.new("L", (4, 1)))
        False
    """
    rgb = to_rgb(image)
    return hashlib.sha256(f"{rgb.width}x{rgb.height}:".encode() + rgb.tobytes()).hexdigest()


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

    Example:
        >>> cache = FeatureCache("features", vision)  # doctest: +SKIP
        >>> cache.features(["cat.png", "dog.png"]).shape  # doctest: +SKIP
        torch.Size([2, 768])
    """

    key = staticmethod(image_key)

    def __init__(self, folder: str | os.PathLike, vision: VisionEncoder) -> None:
        self.vision, self.feature_dim = vision, vision.feature_dim
        self.folder = Path(folder) / fingerprint(vision)
        self._forget()

    def __len__(self) -> int:
        with self._lock():
            self._read_index()
        return len(self._rows)

    def features(self, images: Sequence[Any], batch_size: int = 32, progress: bool = False) -> Tensor:
        """Return the features of images, in order; only those that the cache lacks are computed.

        Every image is decoded, for its content is its key, but no more than `batch_size` are held at once.

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
        """
        if batch_size < 1:
            raise GroundingValueError(f"batch_size must be at least 1, got {batch_size}.")
        with self._lock():
            self._read_index()
        keys: list[str] = []
        waiting: dict[str, tuple[str, Image.Image]] = {}
        for position, image in enumerate(tqdm(images, desc="features", unit="image", disable=not progress)):
            rgb = _open(image, position)
            keys.append(image_key(rgb))
            if keys[-1] not in self._rows:
                waiting.setdefault(keys[-1], (_name(image, position), rgb))
            if len(waiting) == batch_size:
                self._add(waiting)
                waiting = {}
        self._add(waiting)
        return self._gather(keys)

    def _gather(self, keys: Sequence[str]) -> Tensor:
        """Return the rows (n, f) of keys, all of which are known."""
        if not keys:
            return torch.zeros(0, self.feature_dim)
        shape = len(self._rows), self.feature_dim
        stored = np.memmap(self.folder / FEATURES_FILE, STORED, mode="r", shape=shape)
        return torch.from_numpy(np.asarray(stored[[self._rows[key] for key in keys]], dtype=np.float32))

    def _add(self, waiting: Mapping[str, tuple[str, Image.Image]]) -> None:
        """Compute and write what is still missing of `waiting`, key -> (name, RGB image)."""
        with self._lock():
            self._read_index()
        missing = {key: value for key, value in waiting.items() if key not in self._rows}
        if not missing:
            return
        # Encoding holds no lock, so that processes with different images do not wait for each other.
        computed = dict(zip(missing, self._encode(list(missing.values())), strict=True))
        with self._lock():
            self._read_index()
            self._write({key: row for key, row in computed.items() if key not in self._rows})
            self._read_index()

    @torch.no_grad()
    def _encode(self, named: Sequence[tuple[str, Image.Image]]) -> np.ndarray:
        """Return the features (n, f) of named images as float16."""
        model = self.vision.model
        was_training = model.training
        model.eval()
        try:
            features = self.vision(self.vision.preprocess([image for _, image in named])).float().cpu()
        finally:
            model.train(was_training)
        if features.shape != (len(named), self.feature_dim):
            expected = len(named), self.feature_dim
            raise GroundingValueError(f"The encoder must give features {expected}, got {tuple(features.shape)}.")
        rounded = features.half()
        for (name, _), row, exact in zip(named, rounded, features, strict=True):
            if not torch.isfinite(row).all():
                raise GroundingValueError(
                    f"The features of {name} reach {exact.abs().max():.3g}, which is not finite in float16, and the "
                    "cache holds float16. Use this encoder without a cache, or scale its output down."
                )
        return rounded.numpy().astype(STORED)

    def _write(self, rows: Mapping[str, np.ndarray]) -> None:
        """Append rows, then the line that makes them count; the lock is held and the index is read."""
        if not rows:
            return
        start, width = len(self._rows), self.feature_dim * STORED.itemsize
        line = json.dumps({"row": start, "keys": list(rows)}) + "\n"
        with open(self.folder / FEATURES_FILE, "ab") as file:
            _append(file, start * width, b"".join(row.tobytes() for row in rows.values()))
        with open(self.folder / INDEX_FILE, "ab") as file:
            _append(file, self._index_end, line.encode())

    def _read_index(self) -> None:
        """Learn the rows that were added since the last look; the lock is held."""
        index_size, features_size = _size(self.folder / INDEX_FILE), _size(self.folder / FEATURES_FILE)
        rows_on_disk = features_size // (self.feature_dim * STORED.itemsize)
        if index_size < self._index_end or rows_on_disk < len(self._rows):
            self._forget()  # Someone emptied the cache, or cut it short.
        if index_size == self._index_end:
            return
        with open(self.folder / INDEX_FILE, "rb") as file:
            file.seek(self._index_end)
            for line in file:
                keys = _keys_of(line, len(self._rows))
                if not keys or len(self._rows) + len(keys) > rows_on_disk:
                    return
                self._rows.update({key: row for row, key in enumerate(keys, start=len(self._rows))})
                self._index_end += len(line)

    def _forget(self) -> None:
        self._rows: dict[str, int] = {}
        self._index_end = 0

    def _lock(self) -> FileLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / LOCK_FILE)


def _append(file: BinaryIO, end: int, data: bytes) -> None:
    """Cut off what a killed process left behind `end`, write there, and wait until it is on disk."""
    file.truncate(end)
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _keys_of(line: bytes, row: int) -> list[str]:
    """Return the keys of a line of the index that begins at `row`; none where it is incomplete or another row's."""
    if not line.endswith(b"\n"):
        return []
    try:
        entry = json.loads(line)
        return entry["keys"] if entry["row"] == row else []
    except (ValueError, KeyError, TypeError):
        return []


def _open(image: Any, position: int) -> Image.Image:
    try:
        return to_rgb(image)
    except GroundingError as error:
        raise type(error)(f"images[{position}]: {error}") from error


def _name(image: Any, position: int) -> str:
    return f"images[{position}]" + ("" if isinstance(image, Image.Image) else f", {os.fspath(image)!r},")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
