"""`FaissIndex`: approximate search by faiss beside the exact vectors, for indexes of hundreds of thousands and more."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from visual_ground.errors import GroundingFileError, GroundingStateError
from visual_ground.index.engines.base import SearchResult
from visual_ground.index.engines.exact import ExactIndex, as_block
from visual_ground.index.engines.faiss_kinds import (
    CANDIDATES,
    CODE_ROUNDS,
    EFFORTS,
    FEWEST_TO_LEARN,
    KINDS,
    LEARNT_FROM,
    factory_of,
    kind_for,
    load_faiss,
)
from visual_ground.storage.atomic import replacing
from visual_ground.storage.tensors import FORMAT_VERSION, read_json, write_json

logger = logging.getLogger(__name__)

FILE, ABOUT = "index.faiss", "index.faiss.json"  # In the folder of an image index.
TARGET_RECALL = 0.95
SAMPLE, SAMPLE_K = 200, 10  # Queries that the recall is measured with, and how many entries for each.
FEW = 0.05  # A filter that allows a smaller part is searched exactly: the graph would lead to nothing but others.
ROWS_AT_ONCE = 1 << 16


class FaissIndex:
    """A search engine whose candidates come from faiss, and whose scores are exact.

    The vectors stay where they are (in a mapped file, for an index that was opened), and faiss holds only what finds
    them. Entries can be added to any kind and removed from it without building it again.

    Args:
        vectors: (n, q), or an `ExactIndex` that holds them.
        kind: "flat", "hnsw", or "ivfpq", which is smallest; by the number of vectors if None.
        target_recall: the part of the 10 best entries that a search should find; it costs time.

    Attributes:
        recall: the part that was found of a sample, measured when it was built; None for an empty index.
        effort: how many vectors a search looks at.

    Raises:
        GroundingStateError: faiss is not installed.
        GroundingValueError: another kind, or too few vectors to learn IVF-PQ from.

    Example:
        >>> index = FaissIndex(torch.eye(3), kind="flat")
        >>> index.search(torch.tensor([[0.1, 0.9, 0.2]]), k=2).positions.tolist()
        [[1, 2]]
    """

    FILES: ClassVar[tuple[str, ...]] = (FILE, ABOUT)

    def __init__(
        self, vectors: Tensor | ExactIndex, kind: str | None = None, target_recall: float = TARGET_RECALL
    ) -> None:
        faiss = load_faiss()
        self.exact = vectors if isinstance(vectors, ExactIndex) else ExactIndex(vectors)
        if self.exact.end != len(self.exact):
            self.exact = ExactIndex(self.exact.vectors)
        self.kind = kind or kind_for(len(self.exact))
        self.recall: float | None = None
        self._is_mapped = False
        recipe = factory_of(self.kind, len(self.exact), self.dim)
        self._index = faiss.index_factory(self.dim, recipe, faiss.METRIC_INNER_PRODUCT)
        self.effort = EFFORTS[self.kind][0]
        if self.kind == "ivfpq":
            self._index.pq.cp.niter = CODE_ROUNDS
            self._index.train(self._sample(LEARNT_FROM * self._index.nlist).numpy())
        for chunk in self.exact.chunks(ROWS_AT_ONCE):
            self._index.add(chunk.float().numpy())
        self._measure(target_recall)

    @property
    def dim(self) -> int:
        """q, the width of its vectors."""
        return self.exact.dim

    def __len__(self) -> int:
        return len(self.exact)

    def add(self, vectors: Tensor) -> None:
        """Append vectors (m, q); they get the next positions."""
        # Not left to faiss, whose error in one of its threads ends the process.
        if self._is_mapped:
            raise GroundingStateError(
                "An IVF-PQ index that is mapped from its file takes no more vectors. Build it again of the old and "
                "the new ones: FaissIndex(index.exact.changed([], vectors))."
            )
        exact = self.exact.changed([], vectors)
        self._index.add(as_block(vectors).float().numpy())
        self.exact = exact

    def remove(self, positions: Sequence[int]) -> None:
        """Take vectors out; searches pass over them, and their space is free when the index is built again."""
        self.exact = self.exact.changed(positions, torch.empty(0, self.dim))

    def search(self, vectors: Tensor, k: int, filter: Tensor | None = None) -> SearchResult:
        """Return the k best entries that faiss finds for each query; see `VectorIndex.search`.

        If a filter allows few vectors, or faiss finds fewer than it should, all that are allowed are compared.
        """
        allowed = self.exact.allowed(filter)
        count = self.exact.end if allowed is None else int(allowed.sum())
        if k < 1 or vectors.dim() != 2 or vectors.shape[1] != self.dim or not count or count < FEW * self.exact.end:
            return self.exact.search(vectors, k, filter)
        queries, wanted = as_block(vectors).float(), min(k, count)
        found = self._candidates(queries, wanted, allowed)
        if not len(queries) or bool((found[:, :wanted] < 0).any()):
            return self.exact.search(vectors, k, filter)
        scores = torch.stack([self._scores(query, row) for query, row in zip(queries, found, strict=True)])
        best = scores.topk(wanted, dim=-1)
        return SearchResult(found.gather(1, best.indices), best.values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the vectors, as `ExactIndex` does, and what finds them, into `PATH.faiss` and `PATH.faiss.json`."""
        whole = self.whole()
        whole.exact.save(path)
        with replacing(f"{path}.faiss") as temporary:
            whole.write(temporary)
        write_json(f"{path}.faiss.json", whole.about(""))

    def whole(self) -> FaissIndex:
        """Return the index without removed vectors, built again if there are any; those after them move up."""
        if self.exact.end == len(self):
            return self
        too_few = self.kind == "ivfpq" and len(self) < FEWEST_TO_LEARN
        return FaissIndex(self.exact, None if too_few else self.kind)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write what finds the vectors, without the vectors."""
        load_faiss().write_index(self._index, os.fspath(path))

    def writers(self, belongs_to: Callable[[], str]) -> dict[str, Callable[[Path], object]]:
        """Return what writes its files; see `SavedEngine.writers`."""
        return {FILE: self.write, ABOUT: lambda path: write_json(path, self.about(belongs_to()))}

    def about(self, belongs_to: str) -> dict[str, Any]:
        """Return what is to be known beside that file; `belongs_to` is a checksum of the vectors, if there is one."""
        return {"format_version": FORMAT_VERSION, "effort": self.effort, "recall": self.recall, "vectors": belongs_to}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FaissIndex:
        """Open what `save` wrote, mapped into memory; GroundingFileError if the files are damaged."""
        return cls.beside(ExactIndex.load(path), f"{path}.faiss")

    @classmethod
    def read(cls, folder: Path, exact: ExactIndex, belongs_to: str) -> FaissIndex:
        """Open its files in the folder of an index; see `beside`."""
        return cls.beside(exact, folder / FILE, belongs_to)

    @property
    def description(self) -> str:
        """What an index's README says of its search."""
        if self.recall is None:
            return ""
        return (
            f"It is searched with faiss ({self.kind}). Of the {SAMPLE_K} best entries, a search finds "
            f"{100 * self.recall:.1f} %, measured against exact search with {SAMPLE} queries."
        )

    @classmethod
    def beside(cls, exact: ExactIndex, path: str | os.PathLike[str], belongs_to: str = "") -> FaissIndex:
        """Open what `write` wrote into a file and `about` into `PATH.json`, beside the vectors it was built of."""
        faiss, about = load_faiss(), read_json(Path(f"{path}.json"), FORMAT_VERSION)
        try:
            stored = faiss.read_index(str(Path(path)), faiss.IO_FLAG_MMAP)
        except RuntimeError as error:
            raise GroundingFileError(f"{path} cannot be read by faiss: {error}. Build it again.") from error
        kind = KINDS.get(type(stored).__name__)
        if stored.ntotal != len(exact) or stored.d != exact.dim or kind is None or about.get("vectors") != belongs_to:
            raise GroundingFileError(
                f"{path} holds {stored.ntotal} vectors of width {stored.d} in a {type(stored).__name__}, and was not "
                f"made for this index of {len(exact)} vectors of width {exact.dim}. Build it again."
            )
        index = cls.__new__(cls)
        index.exact, index._index, index.kind = exact, stored, kind
        index._is_mapped = kind == "ivfpq"
        index.effort, index.recall = about.get("effort", EFFORTS[kind][-1]), about.get("recall")
        if type(index.effort) is not int or not isinstance(index.recall, (float, type(None))):
            raise GroundingFileError(f"{path}.json is damaged: it holds {about}. Build it again.")
        return index

    def _sample(self, count: int) -> Tensor:
        """Return some vectors, evenly taken from all."""
        positions = torch.linspace(0, len(self) - 1, min(count, len(self)), dtype=torch.double).long()
        return self.exact.at(positions).float()

    def _candidates(self, queries: Tensor, count: int, allowed: Tensor | None) -> Tensor:
        faiss = load_faiss()
        bits = None if allowed is None else np.packbits(allowed.numpy(), bitorder="little")
        options: dict[str, Any] = {} if bits is None else {"sel": faiss.IDSelectorBitmap(bits)}
        if self.kind == "ivfpq":
            count = min(CANDIDATES * count, self.exact.end)
            parameters = faiss.SearchParametersIVF(nprobe=self.effort, **options)
        elif self.kind == "hnsw":
            parameters = faiss.SearchParametersHNSW(efSearch=max(self.effort, 2 * count), **options)
        else:
            parameters = faiss.SearchParameters(**options)
        return torch.from_numpy(self._index.search(queries.numpy(), count, params=parameters)[1])

    def _scores(self, query: Tensor, positions: Tensor) -> Tensor:
        known = positions >= 0
        scores = torch.full((len(positions),), float("-inf"))
        scores[known] = self.exact.at(positions[known]).float() @ query
        return scores

    def _measure(self, target: float) -> None:
        """Raise the effort until the recall of a sample is reached."""
        if not len(self):
            return
        # Vectors between two entries, and not entries: those would find themselves, however bad the index is.
        rows = np.random.default_rng(0).integers(0, len(self), (2, SAMPLE))
        queries = self.exact.at(rows[0].tolist()).float() + self.exact.at(rows[1].tolist()).float()
        best = self.exact.search(queries, SAMPLE_K).positions
        for effort in EFFORTS[self.kind]:
            self.effort = effort
            found = self.search(queries, SAMPLE_K).positions
            self.recall = float((found[:, :, None] == best[:, None, :]).any(-1).float().mean())
            if self.recall >= target:
                return
        logger.warning(
            "The index finds %.0f %% of the best entries, less than the %.0f %% that were asked for.",
            100 * (self.recall or 0),
            100 * target,
        )
