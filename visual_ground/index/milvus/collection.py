"""The rows of one Milvus collection: positions from 0, each written whole, and a row that counts them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from operator import methodcaller
from typing import Any

from visual_ground.errors import GroundingError, GroundingStateError
from visual_ground.index.milvus.connection import Connection
from visual_ground.index.milvus.counter import COUNTER, Counter
from visual_ground.index.milvus.schema import MilvusSearch, check_name, indexes_of, schema_of, width_of

logger = logging.getLogger(__name__)

BUILDING = "_building"  # Ends the name of a collection until all its first rows are there.
BATCH_BYTES = 8 << 20  # Of rows sent at once; servers take 64 MiB.
WINDOW = 4096  # Rows read at once; servers give 16,384, and 64 MiB.


class Collection:
    """A collection with the fields position, vector, key, entry and thumbnail.

    One process writes at a time, and any number read.

    Raises:
        GroundingStateError: there is no such collection, or Milvus cannot be reached.
        GroundingFileError: it has other fields, or no counter.
    """

    def __init__(self, connection: Connection, name: str) -> None:
        check_name(name)
        self.connection, self.name = connection, name
        if not connection.call(lambda client: client.has_collection(name)):
            there = [one for one in connection.call(lambda client: client.list_collections())]
            raise GroundingStateError(
                f"Milvus at {connection.server} has no collection {name!r}; it has {sorted(there)}. Create it, or "
                "check the name."
            )
        self.dim = width_of(connection.call(lambda client: client.describe_collection(name)), name)
        connection.call(lambda client: client.load_collection(name))
        self.counter = self.read_counter()

    @classmethod
    def create(cls, connection: Connection, name: str, dim: int, search: MilvusSearch) -> Collection:
        """Make an empty collection, whose name must be new and is not its own before `publish`."""
        check_name(name)
        if connection.call(lambda client: client.has_collection(name)):
            raise GroundingStateError(
                f"Milvus at {connection.server} has a collection {name!r} already. Open it, choose another name, or "
                "drop it."
            )
        building = name + BUILDING

        def make(client: Any) -> None:
            client.drop_collection(building)
            client.create_collection(building, schema=schema_of(dim), consistency_level="Session")
            client.create_index(building, indexes_of(client, search), sync=False)
            client.load_collection(building)
            client.upsert(building, [Counter().to_row(dim)])

        connection.call(make)
        return cls(connection, building)

    def publish(self) -> None:
        """Give the collection its name."""
        name = self.name.removesuffix(BUILDING)

        def rename(client: Any) -> None:
            if client.has_collection(self.name):  # Not so where the first try was carried out and its answer lost.
                client.rename_collection(self.name, name)
            client.load_collection(name)

        self.connection.call(rename)
        self.name = name

    def drop(self) -> None:
        """Delete the collection, if Milvus can be reached; else the next one that is built under its name does."""
        with suppress(GroundingError):
            self.connection.call(lambda client: client.drop_collection(self.name))

    def read_counter(self) -> Counter:
        """Read the counter, which another process may have changed."""
        rows = self.connection.call(lambda client: client.get(self.name, ids=[COUNTER], output_fields=["entry"]))
        self.counter = Counter.from_rows(rows, self.name)
        return self.counter

    def write_counter(self, counter: Counter) -> None:
        """Write the counter."""
        self.connection.call(lambda client: client.upsert(self.name, [counter.to_row(self.dim)]))
        self.counter = counter

    def append(self, rows: Iterable[dict[str, Any]], count: int, columns: set[str], next_id: int) -> range:
        """Append `count` rows, which lack only their position, all or none, and return their positions.

        The positions are taken first, in the counter. Where a process dies before all rows are there, the next one that
        writes deletes those that are.
        """
        before = self.clean()
        positions = range(before.end, before.end + count)
        after = before.grown(count, columns, next_id)
        self.write_counter(replace(after, pending=(positions.start, positions.stop)))
        try:
            numbered = ({**row, "position": position} for position, row in zip(positions, rows, strict=True))
            for batch in _batches(numbered, self.dim):
                self.connection.call(methodcaller("insert", self.name, batch), methodcaller("upsert", self.name, batch))
            self.write_counter(after)
        except BaseException:
            try:
                self.clean()
            except GroundingError as error:
                logger.warning("Rows %s are left until the index is written again: %s", positions, error)
            raise
        return positions

    def clean(self) -> Counter:
        """Delete what an `append` left that did not come to its end, and return the counter."""
        counter = self.read_counter()
        if counter.pending is None:
            return counter
        start, end = counter.pending
        self.connection.call(
            lambda client: client.delete(self.name, filter=f"position >= {start} and position < {end}")
        )
        self.write_counter(replace(counter, pending=None))
        return self.counter

    def upsert(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows over those at the same positions."""
        for batch in _batches(rows, self.dim):
            self.connection.call(methodcaller("upsert", self.name, batch))

    def delete(self, positions: Sequence[int]) -> None:
        """Delete rows; positions that hold none are passed over."""
        for start in range(0, len(positions), WINDOW):
            some = list(positions[start : start + WINDOW])
            self.connection.call(methodcaller("delete", self.name, ids=some))

    def count(self) -> int:
        """Return how many rows there are."""
        rows = self.connection.call(
            lambda client: client.query(self.name, filter="position >= 0", output_fields=["count(*)"])
        )
        return int(rows[0]["count(*)"])

    def at(self, positions: Sequence[int], *fields: str) -> dict[int, dict[str, Any]]:
        """Return rows by position; those that are not there are left out."""
        found: dict[int, dict[str, Any]] = {}
        for start in range(0, len(positions), WINDOW):
            some = list(positions[start : start + WINDOW])
            rows = self.connection.call(methodcaller("get", self.name, ids=some, output_fields=["position", *fields]))
            found |= {row["position"]: row for row in rows}
        return found

    def matching(self, expression: str, *fields: str) -> list[dict[str, Any]]:
        """Return the rows, no more than `WINDOW`, for which an expression holds."""
        names = ["position", *fields]
        return list(
            self.connection.call(
                lambda client: client.query(self.name, filter=expression, output_fields=names, limit=WINDOW)
            )
        )

    def rows(self, expression: str, *fields: str) -> Iterator[dict[str, Any]]:
        """Yield the rows for which an expression holds, in order of their positions."""
        for start in range(0, self.read_counter().end, WINDOW):
            window = f"position >= {start} and position < {start + WINDOW} and ({expression})"
            yield from sorted(self.matching(window, *fields), key=lambda row: int(row["position"]))


def _batches(rows: Iterable[dict[str, Any]], dim: int) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += 4 * dim + len(row["key"]) + len(row["thumbnail"]) + len(str(row["entry"]))
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
