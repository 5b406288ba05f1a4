"""An entry of an index as a row of Milvus: id, image address, thumbnail and metadata."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from visual_ground.errors import GroundingFileError, GroundingValueError
from visual_ground.index.milvus.expressions import INT64, key_of
from visual_ground.index.table.filters import kind_of

LONGEST = 65_535  # Bytes that Milvus keeps in one cell.
KINDS = ("number", "string", "bool")


@dataclass(frozen=True)
class Entry:
    """What a vector stands for.

    Args:
        id: its name.
        image: a path or an address on the network.
        thumbnail: a JPEG file.
        metadata: JSON values.
    """

    id: str | int
    image: str | None = None
    thumbnail: bytes | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def to_row(entry: Entry | None) -> dict[str, Any]:
    """Return the cells of an entry that Milvus can keep; of a vector that stands for nothing where None."""
    if entry is None:
        return {"key": "", "entry": {}, "thumbnail": ""}
    cells: dict[str, Any] = {"id": {"string" if isinstance(entry.id, str) else "number": entry.id}}
    if entry.image is not None:
        cells["image"] = entry.image
    for name, value in entry.metadata.items():
        # What no filter compares stays out of the way of filters, and so do whole numbers beyond Milvus's 64 bits.
        plain = kind_of(value) if name and (type(value) is not int or value in INT64) else None
        cells.setdefault(plain or "other", {})[name] = value
    row = {
        "key": key_of(entry.id),
        "entry": cells,
        "thumbnail": "" if entry.thumbnail is None else base64.b64encode(entry.thumbnail).decode("ascii"),
    }
    sizes = {"id": str(row["key"]), "metadata": json.dumps(cells), "thumbnail": str(row["thumbnail"])}
    for what, text in sizes.items():
        if len(text.encode("utf-8")) > LONGEST:
            raise GroundingValueError(
                f"The {what} of {str(entry.id)[:80]!r} takes more than the {LONGEST} bytes that Milvus keeps. Make it "
                "smaller, or keep it elsewhere and store its address."
            )
    return row


def columns_of(entry: Entry | None) -> set[str]:
    """Return the names of an entry's metadata."""
    return set() if entry is None else set(entry.metadata)


def from_row(row: Mapping[str, Any]) -> Entry:
    """Return the entry in a row; GroundingFileError for a row that `to_row` did not make."""
    cells = row.get("entry")
    try:
        assert isinstance(cells, dict)
        id = next(iter(cells["id"].values()))
        metadata = {name: value for kind in (*KINDS, "other") for name, value in cells.get(kind, {}).items()}
        thumbnail = base64.b64decode(row["thumbnail"]) if row.get("thumbnail") else None
        return Entry(id, cells.get("image"), thumbnail, metadata)
    except (AssertionError, KeyError, AttributeError, StopIteration, ValueError) as error:
        raise GroundingFileError(
            f"Row {row.get('position')} of the Milvus collection is no entry of an image index. Build it again."
        ) from error
