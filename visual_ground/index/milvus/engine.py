"""`MilvusIndex`: a search engine whose vectors are in Milvus."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor

from visual_ground.errors import GroundingIndexError, GroundingValueError
from visual_ground.index.engines.base import SearchResult
from visual_ground.index.engines.exact import ExactIndex, as_block
from visual_ground.index.milvus.collection import Collection
from visual_ground.index.milvus.connection import COLLECTION, Connection, Place, lite_file, server_at
from visual_ground.index.milvus.counter import COUNTER
from visual_ground.index.milvus.expressions import listed
from visual_ground.index.milvus.rows import Entry, columns_of, to_row
from visual_ground.index.milvus.schema import MilvusSearch
from visual_ground.progress import progress_bar

MOST_FOUND = 16_000  # Entries for one query; servers give 16,384.
QUERIES_AT_ONCE = 1024
LONGEST_LIST = 50_000  # Positions in one expression.
ROWS_AT_ONCE = 1 << 14


class MilvusIndex:
    """Vectors in a collection of Milvus, by position.

    `ImageIndex(engine, ids, ...)` keeps ids and metadata in this process; `MilvusImageIndex` keeps them in Milvus too.

    Args:
        collection: an open collection; `create` and `open` make one.
        search: how it is searched.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     index = MilvusIndex.create(f"{folder}/images.db", torch.eye(3))
        ...     index.search(torch.tensor([[0.1, 0.9, 0.2]]), k=2).positions.tolist()
        [[1, 2]]
    """

    def __init__(self, collection: Collection, search: MilvusSearch | None = None) -> None:
        self.collection = collection
        self._search = MilvusSearch() if search is None else search

    @classmethod
    def create(
        cls,
        place: Place,
        vectors: Tensor | ExactIndex,
        collection: str = COLLECTION,
        entries: Iterable[Entry] | None = None,
        search: MilvusSearch | None = None,
        progress: bool = False,
    ) -> MilvusIndex:
        """Make a collection of vectors (n, q), which has its name only when all of them are there.

        Args:
            place: a file `images.db` of Milvus Lite, the address of a server, or a `MilvusServer`.
            vectors: unit vectors, or an `ExactIndex` of them.
            collection: its name.
            entries: what the vectors stand for, one each; nothing where None.
            search: how Milvus finds them; by its own choice where None.
            progress: show a progress bar.

        Raises:
            GroundingStateError: Milvus cannot be reached, or has such a collection already.
        """
        exact = vectors if isinstance(vectors, ExactIndex) else ExactIndex(vectors)
        made = Collection.create(Connection(server_at(place)), collection, exact.dim, search or MilvusSearch())
        try:
            index = cls(made, search)
            given = repeat(None) if entries is None else iter(entries)
            with progress_bar(collection, " vectors", len(exact), progress) as bar:
                for chunk in exact.chunks(ROWS_AT_ONCE):
                    index.add(chunk, [next(given) for _ in range(len(chunk))], bar.update)
            made.publish()
        except BaseException:
            made.drop()
            raise
        return index

    @classmethod
    def open(cls, place: Place, collection: str = COLLECTION, search: MilvusSearch | None = None) -> MilvusIndex:
        """Open a collection; GroundingStateError where there is none, GroundingFileError for another kind."""
        return cls(Collection(Connection(server_at(place)), collection), search)

    @property
    def dim(self) -> int:
        """q, the width of its vectors."""
        return self.collection.dim

    def __len__(self) -> int:
        return self.collection.count()

    def add(
        self,
        vectors: Tensor,
        entries: Sequence[Entry | None] | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        """Append vectors (m, q), all or none, at the next positions; `progress` gets 1 for each that was sent."""
        self._check(vectors)
        known = [None] * len(vectors) if entries is None else list(entries)
        cells = [to_row(entry) for entry in known]  # All are checked before any is sent.
        next_id = max((one.id + 1 for one in known if one is not None and isinstance(one.id, int)), default=0)
        columns = set[str]().union(*map(columns_of, known))
        if not cells:
            return

        def rows() -> Iterator[dict[str, Any]]:
            for vector, row in zip(as_block(vectors).float().numpy(), cells, strict=True):
                yield {**row, "vector": vector}
                if progress is not None:
                    progress(1)

        self.collection.append(rows(), len(cells), columns, next_id)

    def update(
        self,
        positions: Sequence[int],
        vectors: Tensor | None,
        entries: Sequence[Entry],
        before: Mapping[int, Mapping[str, Any]],
    ) -> None:
        """Write over the rows `before`, all or none; a reader sees each old or new. With None, vectors stay."""
        if vectors is not None and vectors.shape != (len(positions), self.dim):
            raise GroundingValueError(
                f"{len(positions)} entries need vectors ({len(positions)}, {self.dim}), got {tuple(vectors.shape)}."
            )
        old = [dict(before[position]) for position in positions]
        new_vectors = [row["vector"] for row in old] if vectors is None else as_block(vectors).float().numpy()
        rows = [
            {**to_row(entry), "position": position, "vector": vector}
            for position, entry, vector in zip(positions, entries, new_vectors, strict=True)
        ]
        counter = self.collection.clean()
        grown = counter.grown(0, set[str]().union(*map(columns_of, entries)), 0)
        if grown != counter:
            self.collection.write_counter(grown)
        try:
            self.collection.upsert(rows)
        except BaseException:
            self.collection.upsert(old)
            raise

    def remove(self, positions: Sequence[int]) -> None:
        """Take vectors out, or none where one is not there (GroundingIndexError); the others keep their positions."""
        found = self.collection.at(positions)
        if missing := [one for one in positions if one not in found or one < 0]:
            raise GroundingIndexError(f"Positions {missing} hold no vector of this index.")
        self.collection.delete(positions)

    def search(self, vectors: Tensor, k: int, filter: Tensor | None = None) -> SearchResult:
        """Return the k best entries for each query; see `VectorIndex.search`."""
        if filter is None:
            return self.search_where(vectors, k, "")
        ends = (self.collection.counter.end, self.collection.read_counter().end)
        if filter.dtype != torch.bool or filter.dim() != 1 or len(filter) not in ends:
            raise GroundingValueError(
                f"filter must be a mask ({ends[1]},) of bool, got {tuple(filter.shape)} of {filter.dtype}."
            )
        allowed, others = filter.nonzero()[:, 0].tolist(), (~filter).nonzero()[:, 0].tolist()
        if len(others) <= LONGEST_LIST:
            return self.search_where(vectors, k, f"position not in {listed(others)}" if others else "")
        parts = [
            self.search_where(vectors, k, f"position in {listed(allowed[start : start + LONGEST_LIST])}")
            for start in range(0, len(allowed) or 1, LONGEST_LIST)
        ]
        scores, positions = (torch.cat([getattr(p, name) for p in parts], -1) for name in ("scores", "positions"))
        best = scores.topk(min(k, scores.shape[1]), dim=-1)
        return SearchResult(positions.gather(1, best.indices), best.values)

    def search_where(self, vectors: Tensor, k: int, expression: str) -> SearchResult:
        """Return the k best entries for which an expression of Milvus holds, as in `search`."""
        self._check(vectors)
        if not 1 <= k <= MOST_FOUND:
            raise GroundingValueError(f"k must be from 1 to {MOST_FOUND}, got {k}.")
        found: list[list[tuple[int, float]]] = []
        for queries in torch.split(as_block(vectors).float(), QUERIES_AT_ONCE):
            hits = self.collection.connection.call(
                methodcaller(
                    "search",
                    self.collection.name,
                    list(queries.numpy()),
                    filter=expression,
                    limit=k + 1,  # The counter may be among them.
                    output_fields=["position"],
                    search_params={"params": dict(self._search.search_params)},
                )
            )
            pairs = [[(int(hit["position"]), float(hit["distance"])) for hit in one] for one in hits]
            found += [[pair for pair in one if pair[0] != COUNTER][:k] for one in pairs]
        width = min(map(len, found), default=0)
        table = torch.tensor([one[:width] for one in found], dtype=torch.double).reshape(len(found), width, 2)
        return SearchResult(table[..., 0].long(), table[..., 1].float())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Copy the collection into a file of Milvus Lite, `PATH.db`; removed vectors leave no gaps there."""
        rows = self.collection.rows("position >= 0", "vector", "entry", "thumbnail", "key")
        copy = Collection.create(Connection(server_at(lite_file(path))), COLLECTION, self.dim, self._search)
        try:
            counter = self.collection.read_counter()
            copy.append(rows, len(self), set(counter.columns or ()), counter.next_id)
            copy.publish()
        except BaseException:
            copy.drop()
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MilvusIndex:
        """Open what `save` wrote."""
        return cls.open(lite_file(path))

    def _check(self, vectors: Tensor) -> None:
        if vectors.dim() != 2 or vectors.shape[1] != self.dim:
            raise GroundingValueError(f"Vectors must be (m, {self.dim}), got {tuple(vectors.shape)}.")
