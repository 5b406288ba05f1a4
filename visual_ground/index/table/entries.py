"""What an index's positions stand for: ids, images and metadata in Arrow tables, saved as one parquet file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from visual_ground.errors import GroundingIndexError, GroundingValueError
from visual_ground.index.table.filters import Condition, columns_of
from visual_ground.index.table.masks import rows_where
from visual_ground.index.table.rows import (
    RESERVED,
    THUMBNAIL,
    check_counts,
    make_table,
    read_others,
    row_id,
    row_metadata,
)

Ids = Sequence[str | int]


@dataclass(frozen=True)
class Segment:
    """Entries that came together.

    Args:
        table: as `rows.make_table` makes it.
        pictures: the images that are objects rather than addresses, by row.
        given: whether this process was given the addresses, rather than reading them from an index.
    """

    table: pa.Table
    pictures: Mapping[int, Any] = field(default_factory=dict)
    given: bool = True

    def __len__(self) -> int:
        return int(self.table.num_rows)


@dataclass(frozen=True)
class Entries:
    """Entries by position; never changed, so that a reader can go on while a writer makes the next ones.

    Args:
        segments: in order of their positions.
        removed: bool, one for each position.
        has_images: whether any entry was given an image, be it None.
        has_metadata: likewise.
        next_id: the lowest number that was never an id.
    """

    segments: tuple[Segment, ...]
    removed: np.ndarray[Any, np.dtype[np.bool_]]
    has_images: bool
    has_metadata: bool
    next_id: int = 0

    @property
    def end(self) -> int:
        """How many positions were ever given."""
        return len(self.removed)

    def __len__(self) -> int:
        return self.end - int(self.removed.sum())

    def kept(self) -> Iterator[tuple[Segment, np.ndarray[Any, np.dtype[np.bool_]]]]:
        """Yield each segment with a mask over its rows, True for those that were not removed."""
        start = 0
        for segment in self.segments:
            yield segment, ~self.removed[start : start + len(segment)]
            start += len(segment)

    def positions(self) -> list[int]:
        """The positions that hold an entry."""
        return np.flatnonzero(~self.removed).tolist()

    def id(self, position: int) -> str | int:
        """The id at a position; also of an entry that was removed, for a reader who found it before."""
        segment, row = self._locate(position)
        return row_id(segment.table, row)

    def metadata(self, position: int) -> dict[str, Any]:
        """The metadata at a position."""
        segment, row = self._locate(position)
        return row_metadata(segment.table, row)

    def cell(self, position: int, column: str) -> Any:
        """A value of one of the columns `image`, `file` and `thumbnail`; an image may be an object."""
        segment, row = self._locate(position)
        if column == "image" and row in segment.pictures:
            return segment.pictures[row]
        return segment.table[column][row].as_py() if column in segment.table.column_names else None

    def is_given(self, position: int) -> bool:
        """Whether this process was given the image at a position, rather than reading of it in an index."""
        return self._locate(position)[0].given

    def from_elsewhere(self) -> Entries:
        """Return entries whose images are opened only where rules allow it."""
        return replace(self, segments=tuple(replace(segment, given=False) for segment in self.segments))

    def _locate(self, position: int) -> tuple[Segment, int]:
        row = position
        for segment in self.segments:
            if 0 <= row < len(segment):
                return segment, row
            row -= len(segment)
        raise GroundingIndexError(f"Position {position} is outside this index of {self.end} positions.")

    def find(self, ids: Iterable[str | int]) -> dict[str | int, int]:
        """Return the position of each id that is there."""
        wanted = set(ids)
        found: dict[str | int, int] = {}
        start = 0
        for segment in self.segments:
            for column, kind, of_type in (("id", str, pa.string()), ("id_number", int, pa.int64())):
                values = [value for value in wanted if isinstance(value, kind)]
                if values:
                    hits = pc.is_in(segment.table[column], value_set=pa.array(values, of_type))
                    for row in np.flatnonzero(hits.to_numpy()).tolist():
                        if not self.removed[start + row]:
                            found[row_id(segment.table, row)] = start + row
            start += len(segment)
        return found

    def with_rows(self, new: Entries) -> Entries:
        """Return entries followed by others."""
        segments = [*self.segments, *(segment for segment in new.segments if len(segment))]
        # As in ExactIndex: segments that were added grow by doubling. Tables of other columns stay apart.
        while len(segments) > 2 and len(segments[-2]) <= 2 * len(segments[-1]):
            joined = _join(segments[-2], segments[-1])
            if joined is None:
                break
            segments[-2:] = [joined]
        return replace(
            self,
            segments=tuple(segments),
            removed=np.concatenate([self.removed, new.removed]),
            has_images=self.has_images or new.has_images,
            has_metadata=self.has_metadata or new.has_metadata,
            next_id=max(self.next_id, new.next_id),
        )

    def with_thumbnails(self, thumbnails: Sequence[bytes | None]) -> Entries:
        """Return entries of one segment with thumbnails, JPEG files, where any is there."""
        if not any(thumbnails):
            return self
        table = self.segments[0].table.append_column(THUMBNAIL, pa.array(thumbnails, pa.binary()))
        return replace(self, segments=(replace(self.segments[0], table=table),))

    def without(self, positions: Sequence[int]) -> Entries:
        """Return entries without some positions."""
        removed = self.removed.copy()
        removed[list(positions)] = True
        return replace(self, removed=removed)

    # Filters.

    def columns(self) -> set[str]:
        """The columns that a filter can compare."""
        names: set[str] = {"id"} if self.end else set()
        for segment in self.segments:
            names |= set(segment.table.column_names) - RESERVED
            names |= {name for _, values in read_others(segment.table) for name in values}
        return names

    def mask(self, condition: Condition) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return, for each position, whether a condition holds; GroundingValueError for a column that no entry has."""
        unknown = columns_of(condition) - {"id"}
        if unknown and self.end:
            known = {name for segment in self.segments for name in segment.table.column_names} - RESERVED
            if not unknown <= known and (missing := sorted(unknown - self.columns())):
                raise GroundingValueError(f"No entry has {missing}; a filter can compare {sorted(self.columns())}.")
        parts = [rows_where(segment.table, condition) for segment in self.segments]
        return np.concatenate([*parts, np.zeros(0, dtype=bool)])

    def chosen_by(self, choose: Callable[[Mapping[str, Any]], Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return, for each position, whether a function of the metadata chooses it."""
        mask = np.zeros(self.end, dtype=bool)
        for position in self.positions():
            mask[position] = bool(choose(self.metadata(position)))
        return mask


def make_entries(
    ids: Ids | None, images: Sequence[Any] | None, metadata: Sequence[Mapping[str, Any]] | None, count: int, first: int
) -> Entries:
    """Check what comes with `count` vectors and return it as entries; ids are `first` and on where None.

    Raises:
        GroundingValueError: lengths differ, ids repeat, or metadata that is no JSON.
        GroundingTypeError: ids that are neither strings nor integers.
    """
    check_counts(count, ids=ids, images=images, metadata=metadata)
    own = list(range(first, first + count)) if ids is None else list(ids)
    table, pictures = make_table(own, images, metadata)
    following = max((one + 1 for one in own if isinstance(one, int)), default=first)
    return Entries(
        (Segment(table, pictures),),
        np.zeros(count, dtype=bool),
        images is not None,
        metadata is not None,
        max(first, following),
    )


def _join(one: Segment, other: Segment) -> Segment | None:
    if one.given != other.given:
        return None
    try:
        table = pa.concat_tables([one.table, other.table], promote_options="default")
        # Thumbnails may be mapped files, larger than memory, and are not copied.
        whole = [table[name] if name == THUMBNAIL else table[name].combine_chunks() for name in table.column_names]
        table = pa.table(whole, table.column_names)
    except pa.ArrowException:
        return None
    pictures = {**one.pictures, **{len(one) + row: image for row, image in other.pictures.items()}}
    return Segment(table, pictures, one.given)
