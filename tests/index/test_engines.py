"""What every search engine must do, run over all of them."""

import tempfile
import threading
import time
from itertools import count

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch.nn import functional as F

from tests.index.foreign import ListEngine
from visual_ground.errors import GroundingError, GroundingIndexError, GroundingValueError
from visual_ground.index.engines.base import VectorIndex
from visual_ground.index.engines.exact import ExactIndex
from visual_ground.index.engines.faiss_index import FaissIndex
from visual_ground.index.image_index import ImageIndex
from visual_ground.index.milvus.engine import MilvusIndex

DIM = 8
LITE = tempfile.TemporaryDirectory()
NUMBERS = count()


def in_milvus(vectors):
    return MilvusIndex.create(f"{LITE.name}/images.db", vectors, f"images{next(NUMBERS)}")


ENGINES = {
    "exact": ExactIndex,
    "float16": lambda v: ExactIndex(v.half()),
    "list": lambda v: ListEngine(v, DIM),
    "faiss flat": lambda v: FaissIndex(v, "flat"),
    "faiss hnsw": lambda v: FaissIndex(v, "hnsw"),
    "milvus": in_milvus,
}
IDS = st.one_of(st.integers(0, 9), st.sampled_from(list("abcdefgh")))
METADATA = st.fixed_dictionaries(
    {},
    optional={
        "n": st.integers(0, 3),
        "s": st.sampled_from("xy"),
        "m": st.one_of(st.integers(0, 3), st.text(max_size=2)),
    },
)


def vectors_of(seed, count=1):
    vectors = F.normalize(torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)), dim=-1)
    return vectors.half().float()  # The same numbers in an engine of float16.


@pytest.fixture(params=sorted(ENGINES))
def engine(request):
    return ENGINES[request.param]


def found(index, query, k, **options):
    result = index.search(query, k, **options)
    return [[index.entry(p)[0] for p in positions] for positions in result.positions.tolist()]


def test_it_finds_what_a_comparison_with_all_finds(engine):
    vectors, queries = vectors_of(0, 50), vectors_of(1, 3)
    built = engine(vectors)
    assert isinstance(built, VectorIndex) and len(built) == 50 and built.dim == DIM
    result = built.search(queries, 5)
    best = (queries @ vectors.T).topk(5)
    assert torch.equal(result.positions, best.indices) and torch.allclose(result.scores, best.values, atol=1e-3)


def test_positions_stay_and_none_is_given_twice(engine):
    built = engine(vectors_of(0, 10))
    built.remove([2, 9])
    built.add(vectors_of(1, 2))
    assert len(built) == 10
    assert built.search(vectors_of(1, 2), 1).positions.tolist() == [[10], [11]]
    assert not {2, 9} & set(built.search(vectors_of(0, 10), 10).positions.flatten().tolist())


def test_a_saved_engine_finds_the_same(engine, tmp_path):
    built = engine(vectors_of(0, 10))
    built.remove([0])
    built.save(tmp_path / "saved")
    again = type(built).load(tmp_path / "saved")
    one, other = built.search(vectors_of(1, 3), 4), again.search(vectors_of(1, 3), 4)
    assert torch.equal(one.positions - 1, other.positions) and torch.allclose(one.scores, other.scores, atol=1e-3)


class IndexMachine(RuleBasedStateMachine):
    """An index beside a plain dictionary from ids to vectors and metadata."""

    def __init__(self):
        super().__init__()
        self.model, self.seed, self.used = {}, 0, set()

    @initialize(name=st.sampled_from(sorted(ENGINES)))
    def start(self, name):
        self.index = ImageIndex(ENGINES[name](torch.empty(0, DIM)))
        self.saves = name in ("exact", "float16")

    def next_vectors(self, count):
        self.seed += 1
        return vectors_of(self.seed, count)

    @rule(entries=st.dictionaries(IDS, METADATA, max_size=4))
    def add(self, entries):
        vectors = self.next_vectors(len(entries))
        if set(entries) & set(self.model):
            with pytest.raises(GroundingValueError, match="already has"):
                self.index.add(vectors, list(entries), metadata=list(entries.values()))
            return
        self.index.add(vectors, list(entries), metadata=list(entries.values()))
        self.model.update({i: (v, m) for (i, m), v in zip(entries.items(), vectors, strict=True)})
        self.used |= set(entries)

    @rule(count=st.integers(1, 3))
    def add_without_ids(self, count):
        vectors = self.next_vectors(count)
        ids = self.index.add(vectors)
        assert not set(ids) & self.used
        self.used |= set(ids)
        self.model.update({i: (v, {}) for i, v in zip(ids, vectors, strict=True)})

    @rule(ids=st.lists(IDS, max_size=2))
    def remove(self, ids):
        if set(ids) <= set(self.model):
            self.index.remove(ids)
            for one in set(ids):
                del self.model[one]
        else:
            with pytest.raises(GroundingIndexError, match="no entries"):
                self.index.remove(ids)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), metadata=METADATA)
    def update(self, data, metadata):
        one, vectors = data.draw(st.sampled_from(sorted(self.model, key=str))), self.next_vectors(1)
        self.index.update([one], vectors, metadata=[metadata])
        self.model[one] = (vectors[0], metadata)

    @precondition(lambda self: self.saves)
    @rule()
    def save_and_open(self):
        with tempfile.TemporaryDirectory() as folder:
            self.index.save_pretrained(folder)
            self.index = ImageIndex.from_pretrained(folder)
            self.index.save_pretrained(folder)

    @precondition(lambda self: self.saves)
    @rule(entries=st.dictionaries(st.sampled_from(["m1", "m2", "m3"]), METADATA, min_size=1))
    def merge(self, entries):
        vectors = self.next_vectors(len(entries))
        other = ImageIndex(vectors, list(entries), metadata=list(entries.values()))
        if set(entries) & set(self.model):
            with pytest.raises(GroundingValueError, match="already has"):
                self.index.merge(other)
            return
        self.index.merge(other)
        self.model.update({i: (v, m) for (i, m), v in zip(entries.items(), vectors, strict=True)})

    @rule(n=st.integers(0, 3), k=st.integers(1, 4))
    def search(self, n, k):
        filters = [None]
        if any("n" in metadata for _, metadata in self.model.values()):
            filters.append({"n": {"ge": n}})
        for filter in filters:
            allowed = {i: v for i, (v, m) in self.model.items() if filter is None or m.get("n", -1) >= n}
            query = self.next_vectors(1)
            wanted = sorted(allowed, key=lambda i: -float(allowed[i] @ query[0]))[:k]
            assert found(self.index, query, k, filter=filter)[0] == wanted

    @invariant()
    def holds_the_same(self):
        if hasattr(self, "index"):
            assert len(self.index) == len(self.model)
            assert {i: m for i, _, m in self.index} == {i: m for i, (_, m) in self.model.items()}


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=30, stateful_step_count=15, suppress_health_check=list(HealthCheck))


@pytest.mark.slow
def test_for_a_minute_readers_see_whole_answers_while_a_writer_adds_and_removes():
    vectors = vectors_of(0, 400)
    index = ImageIndex(vectors[:200], [f"{i}:0" for i in range(200)], metadata=[{"n": i} for i in range(200)])
    stop, errors, reads = threading.Event(), [], [0, 0, 0]

    def read(number):
        try:
            while not stop.is_set():
                wanted = None if number else {"n": {"lt": 100}}
                result = index.search(vectors[:8], 20, wanted)
                entries = [[index.entry(p) for p in row] for row in result.positions.tolist()]
                for row, scores in zip(entries, result.scores.tolist(), strict=True):
                    assert (
                        len(row) == 20
                        and len({id for id, _, _ in row}) == 20
                        and scores == sorted(scores, reverse=True)
                    )
                    assert all(id.startswith(f"{data['n']}:") for id, _, data in row)
                    assert wanted is None or all(data["n"] < 100 for _, _, data in row)
                reads[number] += 1
        except BaseException as error:
            errors.append(error)

    readers = [threading.Thread(target=read, args=(number,)) for number in range(3)]
    for reader in readers:
        reader.start()
    end, version = time.monotonic() + 60, 0
    while time.monotonic() < end and not errors:
        version += 1
        chosen = [(7 * version + i) % 200 for i in range(20)]
        added = [f"{n}:{version}" for n in chosen]
        index.add(vectors[200:220], added, metadata=[{"n": n} for n in chosen])
        index.update(added[:5], vectors[220:225])
        index.remove(added)
    stop.set()
    for reader in readers:
        reader.join()
    assert not errors and len(index) == 200 and all(reads) and version > 1


def test_readers_see_an_update_whole_while_a_writer_works():
    vectors = vectors_of(0, 20)
    index = ImageIndex(vectors, list(range(20)), metadata=[{"version": 0}] * 20)
    stop, errors = threading.Event(), []

    def read():
        try:
            while not stop.is_set():
                ids = found(index, vectors[:4], 25)
                assert all(len(set(one)) == len(one) >= 20 for one in ids), ids
        except BaseException as error:
            errors.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for version in range(1, 60):
        index.update(list(range(20)), vectors, metadata=[{"version": version}] * 20)
        index.add(vectors[:1], ["more"])
        index.remove(["more"])
    stop.set()
    for reader in readers:
        reader.join()
    assert not errors and len(index) == 20 and index.metadata == [{"version": 59}] * 20


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.add(torch.zeros(1, DIM + 1), ["new"]),
        lambda index: index.add(torch.full((1, DIM), torch.nan), ["new"]),
        lambda index: index.add(torch.zeros(1, DIM), ["a"]),
        lambda index: index.add(torch.zeros(2, DIM), ["new", "new"]),
        lambda index: index.add(torch.zeros(1, DIM), ["new"], metadata=[{"x": float("nan")}]),
        lambda index: index.add(torch.zeros(1, DIM), ["new"], metadata=[{"x": object()}]),
        lambda index: index.add(torch.zeros(1, DIM), ["new"], metadata=[{"x": {1: 2}}]),
        lambda index: index.add(torch.zeros(1, DIM), ["new"], metadata=[3]),
        lambda index: index.add(torch.zeros(1, DIM), [1.5]),
        lambda index: index.add(torch.zeros(1, DIM), [True]),
        lambda index: index.add(torch.zeros(1, DIM), [2**70]),
        lambda index: index.add(torch.zeros(1, DIM), ["\ud800"]),
        lambda index: index.add(torch.zeros(1, DIM), ["new"], ["\ud800.png"]),
        lambda index: index.remove(["a", "gone"]),
        lambda index: index.update(["a", "gone"], torch.zeros(2, DIM)),
        lambda index: index.update(["a"], torch.zeros(2, DIM)),
        lambda index: index.merge(ImageIndex(torch.zeros(1, DIM + 1), ["new"])),
        lambda index: index.merge(ImageIndex(torch.zeros(2, DIM), ["a", "new"])),
    ],
)
def test_a_change_that_is_refused_changes_nothing(change):
    index = ImageIndex(vectors_of(0, 2), ["a", "b"], metadata=[{"x": 1}, {}])
    with pytest.raises(GroundingError):
        change(index)
    assert list(index) == [("a", None, {"x": 1}), ("b", None, {})] and torch.equal(index.vectors, vectors_of(0, 2))
