"""What is missing in the rows of a dataset."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from visual_ground.errors import GroundingValueError

# Columns of rows that were read from files: a row's name in its shard, and why it could not be read.
KEY, PROBLEM = "__key__", "__problem__"


def select_rows(rows: Any, indices: Sequence[int]) -> Any:
    """Return the rows at these indices."""
    if len(indices) == len(rows):
        return rows
    return rows.select(indices) if hasattr(rows, "select") else [rows[i] for i in indices]


def is_missing(value: Any) -> bool:
    """Return whether a cell of a table is empty: None, NaN, pandas' NA, an empty text, or a file that is nowhere.

    Example:
        >>> [is_missing(value) for value in (None, float("nan"), " ", {"bytes": None, "path": None}, "a.png", 0)]
        [True, True, True, True, False, False]
    """
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, Mapping):
        return value.get("bytes") is None and not value.get("path")
    if isinstance(value, numbers.Real):
        return bool(value != value)
    return value is None or type(value).__name__ in ("NAType", "NaTType")


def is_unicode(text: str) -> bool:
    """Return whether a text has no half of a pair of surrogates, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def named_by(row: Mapping[str, Any]) -> str:
    """Return the name that a row has in a shard, as " (name)"; nothing where it has none."""
    return f" ({row[KEY]})" if row.get(KEY) else ""


def has_images(rows: Any, column: str) -> list[bool]:
    """Return for each row of a `datasets.Dataset` whether its column has an image or several, without reading them."""
    found: list[bool] = []
    tables = rows.select_columns([column]).with_format("arrow")
    for start in range(0, len(rows), BATCH_ROWS):
        found += _present(tables[start : start + BATCH_ROWS][column].combine_chunks()).to_pylist()
    return found


# Rows whose columns are looked at together: the images stay on the disk.
BATCH_ROWS = 1000


def _present(values: Any) -> Any:
    """Return for each entry of an Arrow array whether it is there, as an Arrow array of booleans."""
    import pyarrow as pa
    from pyarrow import compute

    kind, valid = values.type, values.is_valid()
    if pa.types.is_struct(kind):
        parts = [_present(compute.struct_field(values, [i])) for i in range(kind.num_fields)]
        return compute.and_(valid, _any(parts)) if parts else valid
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        owners = compute.list_parent_indices(values).filter(_present(compute.list_flatten(values)))
        return compute.is_in(pa.array(range(len(values)), owners.type), owners)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        filled = compute.not_equal(compute.utf8_trim_whitespace(values), "")
        return compute.and_(valid, compute.fill_null(filled, False))
    if pa.types.is_floating(kind):
        return compute.and_(valid, compute.fill_null(compute.invert(compute.is_nan(values)), False))
    return valid


def _any(masks: list[Any]) -> Any:
    from pyarrow import compute

    joined = masks[0]
    for mask in masks[1:]:
        joined = compute.or_(joined, mask)
    return joined


def check_not_empty(rows: Any) -> Mapping[str, Any]:
    """Return a dataset's first row.

    Raises:
        GroundingValueError: there is none.
    """
    for row in rows:
        found: Mapping[str, Any] = row
        return found
    raise GroundingValueError("The dataset is empty; give at least two rows with image and caption.")
