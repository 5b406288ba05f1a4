"""Image features on disk, found by key: the file that a feature cache keeps its features in.

FOLDER/features.f16   vectors of f little-endian float16 numbers, in an `AppendOnlyStore`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visual_ground.storage.append_only import INDEX_FILE, LOCK_FILE, AppendOnlyStore, size_of

__all__ = ["FEATURES_FILE", "INDEX_FILE", "LOCK_FILE", "STORED", "FeatureFile"]

FEATURES_FILE = "features.f16"
STORED = np.dtype("<f2")


class FeatureFile:
    """Features of one width by key, shared by all processes that use the folder; holds no encoder, so it pickles.

    Args:
        folder: where the files are; made where it is missing.
        width: f, numbers per image.

    Example:
        >>> import tempfile
        >>> file = FeatureFile(Path(tempfile.mkdtemp()), 2)
        >>> file.add({"a": np.zeros(2, STORED), "b": np.ones(2, STORED)})
        >>> file.read([file.rows["b"]]).tolist()
        [[1.0, 1.0]]
    """

    def __init__(self, folder: Path, width: int) -> None:
        self.folder, self.width = folder, width
        self._store = AppendOnlyStore(folder, FEATURES_FILE, width * STORED.itemsize)

    @property
    def rows(self) -> dict[str, int]:
        """Key -> row of the file, as far as this process has read."""
        return self._store.numbers

    def refresh(self) -> None:
        """Learn the features that any process has added since the last time."""
        self._store.refresh()

    def add(self, features: Mapping[str, NDArray[Any]]) -> None:
        """Append the features (f,) of keys that the file lacks, all or none; GroundingFileError for a full disk."""
        self._store.add({key: feature.tobytes() for key, feature in features.items()})

    def read(self, rows: Sequence[int] | NDArray[Any]) -> Tensor:
        """Return features by row, (n, f) float32 on the CPU."""
        if not len(rows):
            return torch.zeros(0, self.width)
        path = self._store.data_path
        shape = size_of(path) // (self.width * STORED.itemsize), self.width
        stored = np.memmap(path, STORED, mode="r", shape=shape)
        return torch.from_numpy(np.asarray(stored[np.asarray(rows)], dtype=np.float32))
