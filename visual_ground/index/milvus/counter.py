"""The row of a collection that counts the others, at position -1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from visual_ground.errors import GroundingFileError, GroundingValueError

COUNTER = -1
FORMAT_VERSION = 1
MOST_COLUMNS = 512  # More names are not kept: a row has room for some thousands, and a filter needs few.


@dataclass(frozen=True)
class Counter:
    """What a collection says about itself.

    Args:
        end: how many positions were ever given.
        next_id: the lowest number that was never an id.
        columns: names of metadata; None for more than `MOST_COLUMNS`.
        pending: positions, from and to, that are being written.
    """

    end: int = 0
    next_id: int = 0
    columns: tuple[str, ...] | None = ()
    pending: tuple[int, int] | None = None

    def grown(self, count: int, columns: set[str], next_id: int) -> Counter:
        """Return the counter after `count` more rows."""
        known = None if self.columns is None else tuple(sorted({*self.columns, *columns}))
        if known is not None and len(known) > MOST_COLUMNS:
            known = None
        return replace(self, end=self.end + count, columns=known, next_id=max(self.next_id, next_id))

    def to_row(self, dim: int) -> dict[str, Any]:
        """Return the row; its vector of zeros is found like any other, and passed over."""
        values: dict[str, Any] = {"format_version": FORMAT_VERSION, "end": self.end, "next_id": self.next_id}
        for name in ("columns", "pending"):
            value = getattr(self, name)
            values[name] = None if value is None else list(value)
        return {"position": COUNTER, "vector": [0.0] * dim, "key": "", "entry": values, "thumbnail": ""}

    @classmethod
    def from_rows(cls, rows: Sequence[Any], name: str) -> Counter:
        """Read the counter from what a query for it returned; where it is not there or damaged, GroundingFileError."""
        values = rows[0].get("entry") if rows else None
        if not isinstance(values, dict) or type(values.get("end")) is not int:
            raise GroundingFileError(f"The Milvus collection {name!r} is damaged: it has no counter. Build it again.")
        if values.get("format_version") != FORMAT_VERSION:
            raise GroundingValueError(
                f"The Milvus collection {name!r} is of format version {values.get('format_version')}, and this release "
                f"reads {FORMAT_VERSION}. Build it again, or use the release that wrote it."
            )
        columns, pending = values.get("columns"), values.get("pending")
        return cls(
            values["end"],
            int(values.get("next_id", 0)),
            None if columns is None else tuple(columns),
            None if pending is None else (int(pending[0]), int(pending[1])),
        )
