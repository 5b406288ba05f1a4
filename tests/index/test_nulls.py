"""Columns without a value say the same in next to no memory."""

import pyarrow as pa
import pytest

from visual_ground.index.table.nulls import PIECE, shared_nulls


@pytest.mark.parametrize("count", [0, 1, PIECE - 1, PIECE, 2 * PIECE + 3])
def test_shared_nulls_change_nothing(count):
    numbers = pa.array(range(count), pa.int64())
    table = pa.table({"id": numbers, "file": pa.nulls(count, pa.string()), "year": pa.nulls(count, pa.float64())})
    shared = shared_nulls(table)
    shared.validate(full=True)
    assert shared.equals(table) and shared.schema == table.schema
    assert shared.slice(count // 2).equals(table.slice(count // 2))


def test_empty_columns_cost_next_to_nothing():
    table = pa.table({"file": pa.nulls(40 * PIECE, pa.string())})
    before = pa.total_allocated_bytes()
    table = shared_nulls(table)
    assert pa.total_allocated_bytes() - before < 0
    assert len(table["file"]) == 40 * PIECE
