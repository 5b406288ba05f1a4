"""`MilvusImageIndex`: vectors, ids, pictures and metadata in Milvus, for more images than one machine holds."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from visual_ground.errors import GroundingIndexError, GroundingTypeError, GroundingValueError
from visual_ground.index.engines.base import SearchResult
from visual_ground.index.files import read_index
from visual_ground.index.milvus.collection import WINDOW
from visual_ground.index.milvus.connection import COLLECTION, Place
from visual_ground.index.milvus.engine import MOST_FOUND, MilvusIndex
from visual_ground.index.milvus.entries import entries_of, image_of, make_entries
from visual_ground.index.milvus.expressions import ALL, expression, key_of, listed
from visual_ground.index.milvus.rows import Entry, from_row
from visual_ground.index.milvus.schema import MilvusSearch
from visual_ground.index.remote_images import LinkRules, shown_together
from visual_ground.index.state import Filter, Ids
from visual_ground.index.table.filters import columns_of, parse_filter
from visual_ground.index.table.rows import check_ids

FIELDS = ("entry", "thumbnail")
FIRST_LOOK = 4  # Times k entries that are looked at first for a filter that is a function.


class MilvusImageIndex:
    """An image index of which nothing is in this process: Milvus has the vectors, and what they stand for.

    `generate`, `stream` and the server take it as they take an `ImageIndex`. One process writes at a time, and any
    number search.

    Args:
        engine: the vectors; `create`, `from_folder` and `open` make one.
        rules: which images elsewhere may be opened when they are shown; none where None.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     index = MilvusImageIndex.create(f"{folder}/images.db", dim=3)
        ...     index.add(torch.eye(3), ["a", "b", "c"], metadata=[{"year": y} for y in (1990, 2000, 2010)])
        ...     best = index.search(torch.tensor([[0.2, 0.1, 0.9]]), k=1, filter={"year": {"lt": 2010}})
        ...     index.entry(int(best.positions))
        ['a', 'b', 'c']
        ('a', None, {'year': 1990})
    """

    def __init__(self, engine: MilvusIndex, rules: LinkRules | None = None) -> None:
        self.engine, self.rules = engine, LinkRules() if rules is None else rules
        self._rows = engine.collection

    @classmethod
    def create(
        cls,
        place: Place,
        dim: int,
        collection: str = COLLECTION,
        search: MilvusSearch | None = None,
        rules: LinkRules | None = None,
    ) -> MilvusImageIndex:
        """Make an empty index of vectors (n, dim). The rest is as in `MilvusIndex.create`."""
        return cls(MilvusIndex.create(place, torch.empty(0, dim), collection, None, search), rules)

    @classmethod
    def from_folder(
        cls,
        place: Place,
        folder: str | os.PathLike[str],
        collection: str = COLLECTION,
        search: MilvusSearch | None = None,
        rules: LinkRules | None = None,
        progress: bool = False,
    ) -> MilvusImageIndex:
        """Copy a saved `ImageIndex` into Milvus, whole or not at all.

        Paths and addresses stay what they are. Pictures inside the folder become thumbnails.
        """
        state = read_index(folder, LinkRules() if rules is None else rules)
        return cls(MilvusIndex.create(place, state.exact, collection, entries_of(state), search, progress), rules)

    @classmethod
    def open(
        cls,
        place: Place,
        collection: str = COLLECTION,
        search: MilvusSearch | None = None,
        rules: LinkRules | None = None,
    ) -> MilvusImageIndex:
        """Open an index; see `MilvusIndex.open`."""
        return cls(MilvusIndex.open(place, collection, search), rules)

    @property
    def dim(self) -> int:
        """q, the width of its vectors."""
        return self.engine.dim

    def __len__(self) -> int:
        return len(self.engine)

    def __contains__(self, id: str | int) -> bool:
        return bool(self.find([id]))

    def __iter__(self) -> Iterator[tuple[str | int, Any, Mapping[str, Any]]]:
        return (
            (one.id, image_of(one, self.rules), one.metadata) for one in map(from_row, self._rows.rows(ALL, *FIELDS))
        )

    def search(self, vectors: Tensor, k: int, filter: Filter | None = None) -> SearchResult:
        """Return the best entries for each query (queries, q), fewer than k where fewer are allowed.

        `filter` is as in `ImageIndex.search`. A mapping is evaluated by Milvus. A function is called here, with entry
        after entry from the best one on.
        """
        if filter is None or isinstance(filter, Tensor):
            return self.engine.search(vectors, k, filter)
        if isinstance(filter, Mapping):
            return self.engine.search_where(vectors, k, self._expression(filter))
        if not callable(filter):
            raise GroundingTypeError(
                f"filter must be a mapping, a function of an entry's metadata, or a mask, got {type(filter).__name__}."
            )
        looked = min(FIRST_LOOK * k, MOST_FOUND)
        while True:
            found = self.engine.search(vectors, max(looked, k))
            kept = self._chosen(found.positions, filter)
            width = min([int(row.sum()) for row in kept], default=0)
            if width >= k or found.positions.shape[1] < looked or looked == MOST_FOUND:
                rows = [row.nonzero()[: min(k, width), 0] for row in kept]
                picked = torch.stack(rows) if rows else torch.empty(0, 0, dtype=torch.long)
                return SearchResult(found.positions.gather(1, picked), found.scores.gather(1, picked))
            looked = min(FIRST_LOOK * looked, MOST_FOUND)

    def select(self, filter: Mapping[str, Any]) -> list[str | int]:
        """Return the ids of the entries that a filter allows, in order."""
        return [from_row(row).id for row in self._rows.rows(self._expression(filter), "entry")]

    def find(self, ids: Ids) -> dict[str | int, int]:
        """Return the position of each id that is there."""
        check_ids(ids)
        found: dict[str | int, int] = {}
        for start in range(0, len(ids), WINDOW):
            keys = listed([key_of(one) for one in ids[start : start + WINDOW]])
            found |= {from_row(row).id: row["position"] for row in self._rows.matching(f"key in {keys}", "entry")}
        return found

    def info(self) -> dict[str, Any]:
        """Return how many entries there are, their width, and the columns that a filter can compare."""
        counter = self._rows.read_counter()
        about = {"entries": len(self), "dim": self.dim, "engine": "MilvusIndex", "next_id": counter.next_id}
        return {**about, "columns": sorted({"id", *(counter.columns or ())}), "collection": self._rows.name}

    def entry(self, position: int) -> tuple[str | int, Any, Mapping[str, Any]]:
        """Return id, image and metadata at a position as `ImageIndex.entry`; GroundingIndexError for none."""
        return self.entries([position])[0]

    def entries(self, positions: Sequence[int]) -> list[tuple[str | int, Any, Mapping[str, Any]]]:
        """Return what `entry` returns for each position; Milvus is asked once, and images are fetched side by side."""
        rows = self._rows.at([position for position in positions if position >= 0], *FIELDS)
        if missing := [position for position in positions if position not in rows]:
            raise GroundingIndexError(f"Position {missing[0]} holds no entry of the collection {self._rows.name!r}.")
        found = [from_row(rows[position]) for position in positions]
        images = shown_together([(image_of(e, self.rules), e.thumbnail, str(e.id)) for e in found], self.rules)
        return [(entry.id, image, entry.metadata) for entry, image in zip(found, images, strict=True)]

    def add(
        self,
        vectors: Tensor,
        ids: Ids | None = None,
        images: Sequence[Any] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[str | int]:
        """Add entries with vectors (m, q), whole or not at all, and return their ids.

        As in `ImageIndex.add`; images that are neither paths nor addresses are kept as thumbnails.
        """
        first = self._rows.read_counter().next_id
        own: list[str | int] = list(range(first, first + len(vectors))) if ids is None else list(ids)
        entries = make_entries(own, images, metadata, len(vectors))
        if twice := list(self.find(own)):
            raise GroundingValueError(
                f"The index already has entries {twice[:5]}, {len(twice)} in all. Give others; update() changes those."
            )
        self.engine.add(vectors, entries)
        return own

    def remove(self, ids: Ids) -> None:
        """Take entries out; an id that is not there is a GroundingIndexError, and nothing has changed then."""
        self._rows.clean()
        self._rows.delete(self._positions(ids))

    def update(
        self,
        ids: Ids,
        vectors: Tensor | None = None,
        images: Sequence[Any] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Give entries other vectors, images or metadata; what is None stays. A reader sees an entry old or new."""
        positions = self._positions(ids)
        before = self._rows.at(positions, "key", "vector", *FIELDS)
        old = [from_row(before[position]) for position in positions]
        metadata = [one.metadata for one in old] if metadata is None else metadata
        new = make_entries(ids, images, metadata, len(old))
        if images is None:
            new = [Entry(a.id, b.image, b.thumbnail, a.metadata) for a, b in zip(new, old, strict=True)]
        self.engine.update(positions, vectors, new, before)

    def _expression(self, filter: Mapping[str, Any]) -> str:
        condition = parse_filter(filter)
        wanted, counter = columns_of(condition) - {"id"}, self._rows.counter
        if counter.columns is not None and not wanted <= set(counter.columns):
            counter = self._rows.read_counter()  # Another process may have added the column.
        if counter.columns is not None and counter.end and (missing := sorted(wanted - set(counter.columns))):
            known = sorted({"id", *counter.columns})
            raise GroundingValueError(f"No entry has {missing}; a filter can compare {known}.")
        return expression(condition)

    def _chosen(self, positions: Tensor, choose: Any) -> Tensor:
        rows = self._rows.at(sorted(set(positions.flatten().tolist())), "entry")
        good = [position for position, row in rows.items() if choose(from_row(row).metadata)]
        return torch.isin(positions, torch.tensor(good, dtype=torch.long))

    def _positions(self, ids: Ids) -> list[int]:
        found = self.find(ids)
        if missing := [one for one in ids if one not in found]:
            raise GroundingIndexError(
                f"The index has no entries {missing[:5]}: {len(missing)} of the {len(ids)} that were asked for."
            )
        return [found[one] for one in dict.fromkeys(ids)]
