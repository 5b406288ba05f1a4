"""Tar shards as webdataset has them, read to their end also where they are damaged."""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO

CHUNK = 1 << 20


@dataclass(frozen=True)
class Sample:
    """Members of a shard that follow each other and have the same name up to the first dot; or a damaged place.

    Args:
        key: that name, with its folder; empty for a damaged place.
        members: what is in them, by the rest of their names in lower case.
        problem: what is damaged; None for members that were read.
    """

    key: str
    members: Mapping[str, bytes] = field(default_factory=dict)
    problem: str | None = None


def read_shard(path: str | os.PathLike[str]) -> Iterator[Sample]:
    """Yield a shard's samples in order; what cannot be read is a sample with a `problem`, and the rest follows it."""
    key, members = "", dict[str, bytes]()
    for name, data in _members(path):
        if isinstance(data, str):
            yield Sample("", problem=data)
            continue
        parts = PurePosixPath(name)
        stem, _, suffix = parts.name.partition(".")
        if not stem:
            continue
        if str(parts.parent / stem) != key:
            if members:
                yield Sample(key, members)
            key, members = str(parts.parent / stem), {}
        members[suffix.lower()] = data
    if members:
        yield Sample(key, members)


def _members(path: str | os.PathLike[str]) -> Iterator[tuple[str, bytes | str]]:
    """Yield names and contents of a shard's files, and in place of contents what is wrong with a part of the shard."""
    where, end = os.path.basename(path), 0
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            # Damaged headers and blocks of zeros are passed over, so that what follows them is found.
            with tarfile.open(fileobj=file, mode="r:*", ignore_zeros=True) as shard:
                is_plain = shard.fileobj is file
                while (member := _next(shard, size)) is not None:
                    if is_plain and _holds_data(file, end, member.offset):
                        yield "", f"bytes {end:,} to {member.offset:,} of {where} are damaged"
                    end = shard.offset
                    content = shard.extractfile(member) if member.isfile() else None
                    if content is not None:
                        yield member.name, content.read()
                if is_plain and _holds_data(file, end, size):
                    yield "", f"bytes {end:,} to {size:,} of {where} are damaged"
        # A shard that ends too early, or a damaged one that is compressed: there is nothing after that place.
        except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
            yield "", f"{where} is damaged: {error}" if end else f"{where} is no tar file"


def _next(shard: tarfile.TarFile, size: int) -> tarfile.TarInfo | None:
    """Return the next member, or None at the end; where a header that others belong to is damaged, the one after it."""
    while True:
        try:
            return shard.next()
        except tarfile.ReadError:
            place = shard.fileobj.tell() if shard.fileobj is not None else 0
            if not shard.offset < place < size:
                raise
            shard.offset = place


def _holds_data(file: IO[bytes], start: int, end: int) -> bool:
    """Return whether there is anything but zeros between two places of a file."""
    if start < end:
        file.seek(start)
    while start < end and (chunk := file.read(min(CHUNK, end - start))):
        if chunk.strip(b"\0"):
            return True
        start += len(chunk)
    return False
