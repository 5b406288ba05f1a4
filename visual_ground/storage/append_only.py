"""`AppendOnlyStore`: records found by key, in one file that is only ever appended to and that many processes share.

    FOLDER/DATA_NAME     records, one after the other
    FOLDER/index.jsonl   {"row": R, "keys": [...], "sizes": [...]} per batch: record R + i is keys[i]'s
    FOLDER/lock          held by the process that reads or writes the index

A batch counts from the moment that its line in the index is whole. Its records are written before that line is begun,
so a process that is killed loses its last batch at most, and what it left is cut off before the next one is written.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from visual_ground.errors import GroundingFileError
from visual_ground.storage.atomic import naming_errors

INDEX_FILE = "index.jsonl"
LOCK_FILE = "lock"


class AppendOnlyStore:
    """Records of bytes by key; holds no open file, so it pickles.

    Args:
        folder: where the files are; made where it is missing.
        data_name: name of the file with the records.
        record_size: bytes of each record; None writes their sizes to the index.
        durable: wait for the disk, so that a power cut costs no more than a killed process does.

    Attributes:
        numbers: key -> number of its record, as far as this process has read.

    Example:
        >>> import tempfile
        >>> store = AppendOnlyStore(Path(tempfile.mkdtemp()), "records")
        >>> store.add({"a": b"one", "b": b"second"})
        >>> store.read(store.numbers["b"])
        b'second'
    """

    def __init__(self, folder: Path, data_name: str, record_size: int | None = None, durable: bool = True) -> None:
        self.folder, self.data_path = folder, folder / data_name
        self.record_size, self.durable = record_size, durable
        self._forget()

    def refresh(self) -> None:
        """Read what any process has added since the last time; GroundingFileError where the folder cannot be made."""
        with self._locked():
            self._read_index()

    def add(self, records: Mapping[str, bytes]) -> None:
        """Append the records of keys that the store lacks, all or none; GroundingFileError where the disk is full."""
        with self._locked():
            self._read_index()
            try:
                self._write({key: record for key, record in records.items() if key not in self.numbers})
            except OSError as error:
                raise GroundingFileError(
                    f"Nothing can be written to {str(self.folder)!r}: {error}. What was there before is whole. Make "
                    "room and run the same again."
                ) from error
            self._read_index()

    def read(self, number: int) -> bytes:
        """Return a record by its number."""
        start = self._end_of(number)
        with open(self.data_path, "rb") as file:
            file.seek(start)
            return file.read(self._end_of(number + 1) - start)

    def _end_of(self, count: int) -> int:
        """Return how many bytes the first `count` records take."""
        if self.record_size is not None:
            return count * self.record_size
        return self._ends[count - 1] if count else 0

    def _write(self, records: Mapping[str, bytes]) -> None:
        """Append records, then the line that makes them count; the lock is held and the index is read."""
        if not records:
            return
        entry: dict[str, object] = {"row": len(self.numbers), "keys": list(records)}
        if self.record_size is None:
            entry["sizes"] = [len(record) for record in records.values()]
        with open(self.data_path, "ab") as file:
            _append(file, self._end_of(len(self.numbers)), b"".join(records.values()), self.durable)
        with open(self.folder / INDEX_FILE, "ab") as file:
            _append(file, self._index_end, (json.dumps(entry) + "\n").encode(), self.durable)

    def _read_index(self) -> None:
        """Read what is new in the index; the lock is held."""
        index_size, data_size = size_of(self.folder / INDEX_FILE), size_of(self.data_path)
        if index_size < self._index_end or data_size < self._end_of(len(self.numbers)):
            self._forget()  # The files were emptied, or cut short.
        if index_size == self._index_end:
            return
        with open(self.folder / INDEX_FILE, "rb") as file:
            file.seek(self._index_end)
            for line in file:
                keys, ends = self._parse(line)
                if not keys or ends[-1] > data_size:
                    return
                self.numbers.update({key: number for number, key in enumerate(keys, start=len(self.numbers))})
                if self.record_size is None:
                    self._ends.extend(ends)
                self._index_end += len(line)

    def _parse(self, line: bytes) -> tuple[list[str], list[int]]:
        """Return the keys of the index's next line and where their records end; none where the line is damaged."""
        count = len(self.numbers)
        try:
            entry = json.loads(line) if line.endswith(b"\n") else {}
            if entry.get("row") != count:
                return [], []
            keys, ends = list(entry["keys"]), [self._end_of(count)]
            sizes = [self.record_size] * len(keys) if self.record_size is not None else entry["sizes"]
            for _, size in zip(keys, sizes, strict=True):
                ends.append(ends[-1] + int(size))
            return keys, ends[1:]
        except (ValueError, KeyError, TypeError, AttributeError):
            return [], []

    def _forget(self) -> None:
        self.numbers: dict[str, int] = {}
        # Where each record ends; empty where all have one size. An array: there may be millions.
        self._ends = array("q")
        self._index_end = 0

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock; an error names the folder where it cannot be made or written."""
        lock = FileLock(self.folder / LOCK_FILE)
        with naming_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


def _append(file: BinaryIO, end: int, data: bytes, durable: bool) -> None:
    """Cut off what a killed process left behind `end`, and write there."""
    file.truncate(end)
    file.write(data)
    file.flush()
    if durable:
        os.fsync(file.fileno())


def size_of(path: Path) -> int:
    """Return the size of a file, 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0
