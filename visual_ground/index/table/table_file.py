"""The parquet file of an index's entries."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from visual_ground.errors import GroundingFileError, GroundingValueError
from visual_ground.index.table.entries import Entries, Segment
from visual_ground.index.table.nulls import shared_nulls
from visual_ground.index.table.rows import COLUMN_TYPES, FIXED, OTHERS, RESERVED, THUMBNAIL, parse_others
from visual_ground.storage.atomic import replacing, resolve

ROW_GROUP = 1 << 17


def write_table(path: str | os.PathLike[str], tables: list[pa.Table]) -> None:
    """Write tables of `rows.make_table`, without thumbnails, whole or not at all; mixed columns go to OTHERS."""
    types: dict[str, set[Any]] = {}
    tables = [table.select([name for name in table.column_names if name != THUMBNAIL]) for table in tables]
    for table in tables:
        for one in table.schema:
            types.setdefault(one.name, set()).add(one.type)
    mixed = {name for name, found in types.items() if len(found) > 1}
    fields = [(name, next(iter(found))) for name, found in sorted(types.items()) if name not in mixed]
    schema = pa.schema(fields)
    # A checksum for each page: damage is an error and never a wrong entry.
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema, write_page_checksum=True) as file:
        for table in tables:
            file.write_table(_fitted(table, schema, mixed), row_group_size=ROW_GROUP)
    _release()


def read_table(path: str | os.PathLike[str]) -> pa.Table:
    """Read a parquet file of entries, strictly: a damaged one is a GroundingFileError, ids must be distinct."""
    path = resolve(Path(path).parent, Path(path).name)
    if not path.is_file():
        raise GroundingFileError(f"{path} is missing: the folder is half-written. Save it again.")
    try:
        table = pq.read_table(path, memory_map=True, page_checksum_verification=True, partitioning=None)
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, MemoryError, KeyError) as error:
        raise GroundingFileError(f"{path} is damaged: {error}. Save it again.") from error
    allowed = {*COLUMN_TYPES.values()}
    wrong = [name for name, kind in FIXED.items() if name not in table.column_names or table[name].type != kind]
    wrong += [one.name for one in table.schema if one.name not in RESERVED and one.type not in allowed]
    wrong += [one.name for one in table.schema if one.name == THUMBNAIL and one.type != pa.binary()]
    if wrong or len(set(table.column_names)) != len(table.column_names):
        raise GroundingFileError(f"{path} is damaged: its columns {wrong} are missing or of another type.")
    both = pc.equal(pc.is_valid(table["id"]), pc.is_valid(table["id_number"]))
    if pc.any(both).as_py():
        raise GroundingFileError(f"{path} is damaged: an entry has no id, or two. Save it again.")
    if any(repeats(table[name]) for name in ("id", "id_number")):
        raise GroundingValueError(f"{path} holds an id twice; ids must be distinct.")
    table = shared_nulls(table)
    _release()
    return table


def _release() -> None:
    """Give back what Arrow keeps of the memory that reading and writing took: 20 bytes an entry of a large index."""
    pa.default_memory_pool().release_unused()


def repeats(column: pa.ChunkedArray) -> bool:
    """Return whether a value of a column comes twice."""
    if column.type == pa.int64():  # Sorted, because a set of ten million numbers would take a gigabyte.
        numbers = np.sort(column.drop_null().to_numpy())
        return bool((numbers[1:] == numbers[:-1]).any())
    return bool(pc.count_distinct(column).as_py() < len(column) - column.null_count)


def live_tables(entries: Entries, thumbnails: bool = False) -> Iterator[tuple[Segment, pa.Table, list[int]]]:
    """Yield each segment, its rows that were not removed (with thumbnails, or without), and their numbers in it."""
    for segment, keep in entries.kept():
        names = [name for name in segment.table.column_names if thumbnails or name != THUMBNAIL]
        table = segment.table.select(names)
        yield segment, table if keep.all() else table.filter(pa.array(keep)), _numbers(keep)


def _numbers(keep: np.ndarray[Any, Any]) -> list[int]:
    return np.flatnonzero(keep).tolist()


def _fitted(table: pa.Table, schema: pa.Schema, mixed: set[str]) -> pa.Table:
    """Return a table with the columns of a schema."""

    moved = sorted(mixed & set(table.column_names))
    if moved:
        values = {name: table[name].to_pylist() for name in (*moved, OTHERS)}
        others = []
        for row in range(table.num_rows):
            rest = {} if values[OTHERS][row] is None else parse_others(values[OTHERS][row])
            rest |= {name: values[name][row] for name in moved if values[name][row] is not None}
            others.append(json.dumps(rest, ensure_ascii=False, sort_keys=True) if rest else None)
        table = table.set_column(table.column_names.index(OTHERS), OTHERS, pa.array(others, pa.string()))
    columns = [
        table[one.name] if one.name in table.column_names else pa.nulls(table.num_rows, one.type) for one in schema
    ]
    return pa.table(columns, schema=schema)
