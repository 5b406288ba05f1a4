"""Columns without a value, which would take 4 bytes or more for each entry, as one short piece again and again."""

from __future__ import annotations

import pyarrow as pa

PIECE = 1 << 16


def shared_nulls(table: pa.Table) -> pa.Table:
    """Return a table whose columns without any value take next to no memory."""
    whole, rest = divmod(table.num_rows, PIECE)
    for number, (name, column) in enumerate(zip(table.column_names, table.columns, strict=True)):
        if whole and column.null_count == table.num_rows:
            piece = pa.nulls(PIECE, column.type)
            pieces = [*[piece] * whole, piece.slice(0, rest)]
            table = table.set_column(number, name, pa.chunked_array(pieces))
    return table
