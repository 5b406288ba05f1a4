"""One table row for an entry of an index: which columns it has, how it is checked, and how it is read back."""

from __future__ import annotations

import json
import os
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from visual_ground.errors import GroundingFileError, GroundingTypeError, GroundingValueError
from visual_ground.index.table.filters import fits_int64
from visual_ground.index.table.nulls import shared_nulls
from visual_ground.storage.texts import is_unicode

# Metadata that fit no column of one type: nested values, None, mixed types, whole numbers beyond 64 bits; as JSON.
OTHERS = "other_metadata"
# An entry's id is in `id` or, if it is a number, in `id_number`; its image is an address in `image`, a file of the
# index's own folder in `file`, or both are empty.
FIXED = {"id": pa.string(), "id_number": pa.int64(), "image": pa.string(), "file": pa.string(), OTHERS: pa.string()}
THUMBNAIL = "thumbnail"  # A JPEG file, if the index was built with thumbnails.
RESERVED = frozenset({*FIXED, THUMBNAIL})
COLUMN_TYPES = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
# Keys that are in hardly any entry go to OTHERS, because each column costs something for every entry.
MOST_COLUMNS = 64


def make_table(
    ids: Sequence[str | int], images: Sequence[Any] | None, metadata: Sequence[Mapping[str, Any]] | None
) -> tuple[pa.Table, dict[int, Any]]:
    """Return a table of entries, and the images that are objects, by row.

    Raises:
        GroundingTypeError: an id that is neither a string nor an integer, or metadata that is no mapping.
        GroundingValueError: an id, address or metadata that cannot be saved as text or JSON, or an id that comes twice.
    """
    pictures: dict[int, Any] = {}
    addresses: list[str | None] = []
    for row, image in enumerate(images or []):
        is_path = isinstance(image, (str, os.PathLike))
        addresses.append(os.fspath(image) if is_path else None)
        if not is_path and image is not None:
            pictures[row] = image
    check_ids(ids)
    check_texts("image", addresses)
    count = len(ids)
    columns = {
        "id": pa.array([one if isinstance(one, str) else None for one in ids], pa.string()),
        "id_number": pa.array([None if isinstance(one, str) else one for one in ids], pa.int64()),
        "image": pa.array(addresses or [None] * count, pa.string()),
        "file": pa.nulls(count, pa.string()),
        **_metadata_columns(metadata or [{}] * count),
    }
    check_distinct(ids)
    return shared_nulls(pa.table(columns)), pictures


def check_ids(ids: Sequence[Any]) -> None:
    """Raise unless ids are strings of whole characters, or integers of 64 bits."""
    for one in ids:
        if isinstance(one, bool) or not isinstance(one, (str, int)):
            raise GroundingTypeError(
                f"An id must be a string or an integer, got {_named(one)} of type {type(one).__name__}."
            )
        if isinstance(one, int) and not fits_int64(one):
            raise GroundingValueError(
                f"An id that is a number must fit into 64 bits, got {_named(one)}; make it a string."
            )
    check_texts("id", ids)


def check_texts(name: str, values: Sequence[Any]) -> None:
    """Raise GroundingValueError if one of the strings among some values holds half a character."""
    if (broken := next((v for v in values if isinstance(v, str) and not is_unicode(v)), None)) is not None:
        raise GroundingValueError(
            f"The {name} {_named(broken)} holds half a character (a file name that is not UTF-8?), and cannot be "
            "saved. Rename it."
        )


def check_distinct(ids: Sequence[Any]) -> None:
    """Raise GroundingValueError if an id comes twice."""
    if len(set(ids)) != len(ids):
        twice = next(one for i, one in enumerate(ids) if one in ids[:i])
        raise GroundingValueError(f"ids must be distinct, and {twice!r} comes twice; give each image its own.")


def check_counts(count: int, **columns: Sequence[Any] | None) -> None:
    """Raise GroundingValueError unless each column that is given has as many values as there are vectors."""
    for name, values in columns.items():
        if values is not None and len(values) != count:
            raise GroundingValueError(f"{count} vectors need as many {name}, got {len(values)}.")


def check_metadata(metadata: Sequence[Any]) -> None:
    """Raise unless each is a mapping of JSON values, which come back from a file as they were.

    Raises:
        GroundingTypeError: not a mapping, or a value that JSON has not.
        GroundingValueError: NaN, infinity, or half a character.
    """
    for number, values in enumerate(metadata):
        if not isinstance(values, Mapping):
            raise GroundingTypeError(f"Metadata {number} must be a mapping, got {type(values).__name__}.")
        for key, value in values.items():
            if type(value) in (bool, int) and fits_int64(value) and type(key) is str and key.isascii():
                continue
            _check_value(number, key, value)


def _check_value(number: int, key: Any, value: Any) -> None:
    where = f"Metadata {number} has {_named(key)}: {_named(value)}"
    if not isinstance(key, str):
        raise GroundingTypeError(f"{where}; its keys must be strings.")
    try:
        text = json.dumps({key: value}, ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
        if isinstance(value, (dict, list, tuple)) and json.loads(text) != {key: value}:
            raise TypeError("keys within it must be strings, and sequences lists")
    except (TypeError, RecursionError) as error:
        raise GroundingTypeError(
            f"{where}, which is no JSON value: {error}. Convert it, to a string for one."
        ) from error
    except ValueError as error:
        raise GroundingValueError(f"{where}, which JSON has not: {error}. Leave it out, or use None.") from error


def _named(value: Any) -> str:
    """Return a value for messages: short, whatever is in it."""
    try:
        return reprlib.repr(value)
    except (ValueError, RecursionError):  # A number of more digits than Python writes out.
        return f"a {type(value).__name__} that is too large to be shown"


def _metadata_columns(metadata: Sequence[Mapping[str, Any]]) -> dict[str, pa.Array]:
    """Return a column for each key whose values are of one type, and the rest as JSON in OTHERS."""
    check_metadata(metadata)
    types: dict[str, set[type]] = {}
    counts: Counter[str] = Counter()
    for values in metadata:
        counts.update(values.keys())
        for key, value in values.items():
            types.setdefault(key, set()).add(_column_type(value))
    names = [
        key
        for key, _ in counts.most_common(MOST_COLUMNS)
        if key not in RESERVED
        and key
        and len(types[key] - {type(None)}) == 1
        and types[key] <= {*COLUMN_TYPES, type(None)}
    ]
    columns = {
        key: pa.array([values.get(key) for values in metadata], COLUMN_TYPES[next(iter(types[key] - {type(None)}))])
        for key in sorted(names)
    }
    others = []
    for values in metadata:
        rest = {key: value for key, value in values.items() if key not in columns or value is None}
        others.append(json.dumps(rest, ensure_ascii=False, sort_keys=True) if rest else None)
    return {**columns, OTHERS: pa.array(others, pa.string())}


def _column_type(value: Any) -> type:
    return object if type(value) is int and not fits_int64(value) else type(value)


def row_id(table: pa.Table, row: int) -> str | int:
    """Return the id in a row."""
    name = table["id"][row].as_py()
    value: str | int = table["id_number"][row].as_py() if name is None else name
    return value


def row_metadata(table: pa.Table, row: int) -> dict[str, Any]:
    """Return the metadata in a row."""
    values = {}
    for name in table.column_names:
        if name not in RESERVED and (value := table[name][row].as_py()) is not None:
            values[name] = value
    others = table[OTHERS][row].as_py()
    return values if others is None else {**values, **parse_others(others)}


def read_others(table: pa.Table) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows that have metadata outside of their columns, and these."""
    column = table[OTHERS]
    if column.null_count == len(column):
        return
    for row in np.flatnonzero(pc.is_valid(column).to_numpy()).tolist():
        yield row, parse_others(column[row].as_py())


def parse_others(text: str) -> dict[str, Any]:
    """Read what OTHERS holds for a row."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GroundingFileError(f"The index is damaged: an entry's metadata are no JSON ({error}).") from error
    if not isinstance(values, dict):
        raise GroundingFileError(f"The index is damaged: an entry's metadata are {text[:80]!r}.")
    return values
