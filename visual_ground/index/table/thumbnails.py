"""The thumbnails of an index: one Arrow file, of which nothing is read before a thumbnail is shown."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from visual_ground.errors import GroundingFileError
from visual_ground.index.table.entries import Entries
from visual_ground.index.table.rows import THUMBNAIL
from visual_ground.storage.atomic import replacing, resolve

THUMBNAILS_FILE = "thumbnails.arrow"
SCHEMA = pa.schema([(THUMBNAIL, pa.binary())])
ROWS_AT_ONCE = 4096  # Some 50 MB of thumbnails are in memory while they are written.


def thumbnails_of(entries: Entries) -> list[str]:
    """Return the name of the file for the thumbnails of entries; none where no entry came with one."""
    there = any(THUMBNAIL in segment.table.column_names for segment in entries.segments)
    return [THUMBNAILS_FILE] if there else []


def write_thumbnails(path: str | os.PathLike[str], entries: Entries) -> None:
    """Write the thumbnails of entries that were not removed, in order; null where there is none."""
    with replacing(path) as temporary, pa.ipc.new_file(os.fspath(temporary), SCHEMA) as file:
        for column in _columns(entries):
            for start in range(0, len(column), ROWS_AT_ONCE):
                file.write_table(pa.table([column.slice(start, ROWS_AT_ONCE)], SCHEMA))


def _columns(entries: Entries) -> Iterator[pa.ChunkedArray]:
    for segment, keep in entries.kept():
        if THUMBNAIL not in segment.table.column_names:
            yield pa.chunked_array([pa.nulls(int(keep.sum()), pa.binary())])
            continue
        row = 0
        for chunk in segment.table[THUMBNAIL].chunks:
            yield pa.chunked_array([chunk.filter(pa.array(keep[row : row + len(chunk)]))])
            row += len(chunk)


def read_thumbnails(path: str | os.PathLike[str], count: int) -> pa.ChunkedArray:
    """Return the thumbnails of `count` entries, mapped into memory; GroundingFileError where there are others."""
    path = resolve(Path(path).parent, Path(path).name)
    try:
        with pa.memory_map(os.fspath(path)) as file, pa.ipc.open_file(file) as opened:
            if opened.schema != SCHEMA:
                raise ValueError(f"its columns are {opened.schema.names}")
            table = opened.read_all()
        table.validate(full=True)  # Looks at where each thumbnail starts, and at none of them.
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise GroundingFileError(f"{path} is damaged: {error}. Save the index again.") from error
    if table.num_rows != count:
        raise GroundingFileError(f"{path} holds {table.num_rows} thumbnails of {count} entries. Save the index again.")
    return table[THUMBNAIL]
