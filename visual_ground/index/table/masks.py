"""Which rows of an Arrow table a condition holds for."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from visual_ground.index.table.filters import COMPARISONS, ORDERED, Comparison, Condition, fits_int64, kind_of
from visual_ground.index.table.rows import RESERVED, read_others

ARROW_KINDS = {pa.string(): "string", pa.int64(): "number", pa.float64(): "number", pa.bool_(): "bool"}
Mask: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]


def rows_where(table: pa.Table, condition: Condition) -> Mask:
    """Return a mask over a table's rows, True if a condition holds."""
    if isinstance(condition, Comparison):
        return _compare(table, condition)
    masks: Iterator[Any] = (rows_where(table, one) for one in condition.conditions)
    if condition.joined_by == "not":
        return np.asarray(~next(masks))
    start = np.full(table.num_rows, condition.joined_by == "and")
    return reduce(np.logical_and if condition.joined_by == "and" else np.logical_or, masks, start)


def _compare(table: pa.Table, one: Comparison) -> Mask:
    mask = np.zeros(table.num_rows, dtype=bool)
    names = ("id", "id_number") if one.column == "id" else (one.column,) if one.column not in RESERVED else ()
    for name in names:
        if name in table.column_names:
            mask |= _compare_column(table[name], one)
    if one.column != "id":
        for row, values in read_others(table):
            if one.column in values:
                mask[row] = one.holds(values[one.column])
    return mask


def _compare_column(column: Any, one: Comparison) -> Mask:
    kind = ARROW_KINDS.get(column.type)
    values = one.value if one.operator == "in" else (one.value,)
    comparable = [value for value in values if kind_of(value) == kind]
    how = "eq" if one.operator == "in" else one.operator
    if kind == "bool" and how in ORDERED:
        comparable = []
    found = np.zeros(len(column), dtype=bool)
    functions = {"eq": pc.equal, "ne": pc.not_equal, "lt": pc.less, "le": pc.less_equal}
    functions |= {"gt": pc.greater, "ge": pc.greater_equal}
    for value in comparable:
        if isinstance(value, int) and not fits_int64(value):
            valid = column.is_valid().to_numpy()
            found |= valid & COMPARISONS[how](0.0, float("inf") if value > 0 else float("-inf"))
            continue
        try:
            found |= pc.fill_null(functions[how](column, pa.scalar(value)), False).to_numpy()
        except pa.ArrowException:  # A whole number that no float equals; Python compares the two exactly.
            found |= np.array([other is not None and COMPARISONS[how](other, value) for other in column.to_pylist()])
    return found
