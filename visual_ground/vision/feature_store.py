"""Rows of float16 numbers on disk, found by key: the file that a feature cache keeps its features in.

    FOLDER/features.f16   rows of f little-endian float16 numbers, only ever appended
    FOLDER/index.jsonl    {"row": R, "keys": [...]} per batch: row R + i belongs to keys[i]
    FOLDER/lock           held by the process that reads or writes the index

A batch counts from the moment that its line in the index is whole. Its rows are on disk before that line is begun, so
a process that is killed loses its last batch at most, and what it left is cut off before the next one is written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from visual_ground.errors import GroundingFileError

FEATURES_FILE = "features.f16"
INDEX_FILE = "index.jsonl"
LOCK_FILE = "lock"
STORED = np.dtype("<f2")


class FeatureFile:
    """Rows of one width by key, shared by all processes that use the folder; holds no encoder, so it pickles.

    Args:
        folder: where the files are; made where it is missing.
        width: f, numbers per row.

    Attributes:
        rows: key -> row number, as far as this process has read.

    Example:
        >>> import tempfile
        >>> file = FeatureFile(Path(tempfile.mkdtemp()), 2)
        >>> file.add({"a": np.zeros(2, STORED), "b": np.ones(2, STORED)})
        >>> file.read([file.rows["b"]]).tolist()
        [[1.0, 1.0]]
    """

    def __init__(self, folder: Path, width: int) -> None:
        self.folder, self.width = folder, width
        self._forget()

    def refresh(self) -> None:
        """Learn the rows that were added since the last look, by any process."""
        with self._lock():
            self._read_index()

    def add(self, rows: Mapping[str, np.ndarray]) -> None:
        """Append the rows (f,) of keys that the file lacks, whole or not at all.

        Raises:
            GroundingFileError: the disk is full, or cannot be written.
        """
        with self._lock():
            self._read_index()
            try:
                self._write({key: row for key, row in rows.items() if key not in self.rows})
            except OSError as error:
                raise GroundingFileError(
                    f"The features cannot be written to {str(self.folder)!r}: {error}. Those that were there are "
                    "whole. Make room and run the same again."
                ) from error
            self._read_index()

    def read(self, rows: Sequence[int] | np.ndarray) -> Tensor:
        """Return rows by number, (n, f) float32 on the CPU."""
        if not len(rows):
            return torch.zeros(0, self.width)
        shape = _size(self.folder / FEATURES_FILE) // (self.width * STORED.itemsize), self.width
        stored = np.memmap(self.folder / FEATURES_FILE, STORED, mode="r", shape=shape)
        return torch.from_numpy(np.asarray(stored[np.asarray(rows)], dtype=np.float32))

    def _write(self, rows: Mapping[str, np.ndarray]) -> None:
        """Append rows, then the line that makes them count; the lock is held and the index is read."""
        if not rows:
            return
        start, width = len(self.rows), self.width * STORED.itemsize
        line = json.dumps({"row": start, "keys": list(rows)}) + "\n"
        with open(self.folder / FEATURES_FILE, "ab") as file:
            _append(file, start * width, b"".join(row.tobytes() for row in rows.values()))
        with open(self.folder / INDEX_FILE, "ab") as file:
            _append(file, self._index_end, line.encode())

    def _read_index(self) -> None:
        """Read what is new in the index; the lock is held."""
        index_size, features_size = _size(self.folder / INDEX_FILE), _size(self.folder / FEATURES_FILE)
        rows_on_disk = features_size // (self.width * STORED.itemsize)
        if index_size < self._index_end or rows_on_disk < len(self.rows):
            self._forget()  # Someone emptied the cache, or cut it short.
        if index_size == self._index_end:
            return
        with open(self.folder / INDEX_FILE, "rb") as file:
            file.seek(self._index_end)
            for line in file:
                keys = _keys_of(line, len(self.rows))
                if not keys or len(self.rows) + len(keys) > rows_on_disk:
                    return
                self.rows.update({key: row for row, key in enumerate(keys, start=len(self.rows))})
                self._index_end += len(line)

    def _forget(self) -> None:
        self.rows: dict[str, int] = {}
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


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
