"""Indexes in Milvus Lite: entries, filters, what happens when Milvus is away, and that nothing is half-written."""

import socket
import tempfile
from itertools import count

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.tiny import grounded, picture
from visual_ground import GroundingError, ImageIndex
from visual_ground.errors import GroundingIndexError, GroundingStateError
from visual_ground.index.base import RetrievalIndex
from visual_ground.index.milvus.connection import Connection, MilvusServer
from visual_ground.index.milvus.engine import MilvusIndex
from visual_ground.index.milvus.image_index import MilvusImageIndex
from visual_ground.index.remote_images import ImageLink, LinkRules

FOLDER = tempfile.TemporaryDirectory()
FILE = f"{FOLDER.name}/images.db"
NUMBERS = count()
VALUES = st.one_of(st.integers(-2, 2), st.sampled_from(["a", "b", 'q"\\\n\u2028']), st.booleans(), st.floats(-2, 2))
METADATA = st.dictionaries(st.sampled_from(["x", "y", 'odd "name"']), VALUES, max_size=3)


def name():
    return f"images{next(NUMBERS)}"


def vectors_of(seed, rows=1):
    return F.normalize(torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed)), dim=-1)


def comparisons(column):
    ordered = st.sampled_from(["lt", "le", "gt", "ge"])
    words = st.one_of(
        st.integers(-2, 2), st.sampled_from(["a", "b", 'q"\\\n\u2028']), st.sampled_from([0.5, float("inf")])
    )
    return st.one_of(
        VALUES.map(lambda value: {column: value}),
        st.lists(VALUES, max_size=3).map(lambda values: {column: values}),
        VALUES.map(lambda value: {column: {"ne": value}}),
        st.tuples(ordered, words).map(lambda pair: {column: {pair[0]: pair[1]}}),
    )


LEAVES = st.sampled_from(["x", "y", 'odd "name"', "id"]).flatmap(comparisons)
FILTERS = st.recursive(
    LEAVES,
    lambda one: st.one_of(
        one.map(lambda f: {"not": f}),
        st.lists(one, max_size=3).map(lambda fs: {"or": fs}),
        st.lists(one, max_size=3).map(lambda fs: {"and": fs}),
    ),
    max_leaves=5,
)
EVERY_COLUMN = {"x": 1, "y": 1, 'odd "name"': 1}


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(st.lists(METADATA, min_size=1, max_size=6), st.lists(FILTERS, min_size=1, max_size=6))
def test_a_filter_allows_the_same_entries_as_in_memory(metadata, filters):
    metadata = [*metadata, EVERY_COLUMN]
    ids = [*"abcdef"[: len(metadata) - 2], 7, 'q"\\\n\u2028']
    vectors = vectors_of(0, len(ids))
    plain, index = ImageIndex(vectors, ids, metadata=metadata), MilvusImageIndex.create(FILE, 4, name())
    index.add(vectors, ids, metadata=metadata)
    for filter in filters:
        assert index.select(filter) == plain.select(filter), filter
        one, other = plain.search(vectors[:1], 3, filter), index.search(vectors[:1], 3, filter)
        assert other.positions.tolist() == one.positions.tolist() or not one.positions.numel()
    index.engine.collection.drop()


def test_entries_stay_with_their_vectors_through_every_change_and_a_new_connection():
    index, collection = None, name()
    index = MilvusImageIndex.create(FILE, 4, collection)
    assert isinstance(index, RetrievalIndex) and index.add(vectors_of(0, 2)) == [0, 1]
    address = "https://example.org/c.png"
    index.add(vectors_of(1, 2), ["c", "d"], [address, picture(1)], [{"n": 1, "nested": [None, {"a": 2}]}, {}])
    index.remove([1])
    index.update(["c"], metadata=[{"n": 2, "new": "x"}])
    index.update([0], vectors_of(2))
    again = MilvusImageIndex.open(FILE, collection)
    assert [(id, data) for id, _, data in again] == [(0, {}), ("c", {"n": 2, "new": "x"}), ("d", {})]
    assert len(again) == 3 and "c" in again and 1 not in again
    best = again.search(vectors_of(2), 1).positions.item()
    assert again.entry(best)[0] == 0
    found = again.search(vectors_of(1, 2), 1, {"new": ["x"]})
    assert [again.entry(p)[:2] for p in found.positions[:, 0].tolist()] == [("c", ImageLink(address))] * 2
    assert again.entry(3)[1].size == picture(1).size
    assert again.add(vectors_of(3)) == [2]  # 1 was an id once.
    even = again.search(vectors_of(4), 9, lambda data: data.get("n", 1) % 2 == 0)
    assert [again.entry(p)[0] for p in even.positions[0].tolist()] == ["c"]
    assert again.info()["columns"] == ["id", "n", "nested", "new"]


def test_a_saved_index_is_copied_with_its_pictures_and_answers_the_same(tmp_path):
    model = grounded("llama_untied").eval()
    pictures = [picture(i) for i in range(4)]
    picture(5).save(tmp_path / "far.png")
    index = ImageIndex.build(
        model, [*pictures, tmp_path / "far.png"], ids=list("abcde"), metadata=[{"n": i} for i in range(5)]
    )
    index.remove(["b"])
    index.save_pretrained(tmp_path / "index")
    copy = MilvusImageIndex.from_folder(FILE, tmp_path / "index", name(), rules=LinkRules(folders=[tmp_path]))
    assert [(id, data) for id, _, data in copy] == [(id, data) for id, _, data in index]
    assert copy.entry(0)[1].size == pictures[0].size and copy.entry(3)[1] == str(tmp_path / "far.png")
    options = {"max_new_tokens": 4, "ret_bias": 100.0, "do_sample": False, "filter": {"n": {"ge": 1}}}
    one, other = (model.generate(["w4 w5"], each, **options)[0] for each in (index, copy))
    assert one.images and [i.id for i in one.images] == [i.id for i in other.images]


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.add(torch.zeros(1, 5), ["new"]),
        lambda index: index.add(torch.full((1, 4), torch.nan), ["new"]),
        lambda index: index.add(vectors_of(1), ["a"]),
        lambda index: index.add(vectors_of(1, 2), ["new", "new"]),
        lambda index: index.add(vectors_of(1), ["new"], metadata=[{"x": float("nan")}]),
        lambda index: index.add(vectors_of(1), ["new"], metadata=[{"x": "long" * 20_000}]),
        lambda index: index.add(vectors_of(1), [1.5]),
        lambda index: index.remove(["a", "gone"]),
        lambda index: index.update(["a", "gone"], vectors_of(1, 2)),
        lambda index: index.update(["a"], vectors_of(1, 2)),
        lambda index: index.engine.remove([0, 9]),
        lambda index: index.engine.remove([-1]),
        lambda index: index.search(vectors_of(1), 0),
        lambda index: index.search(vectors_of(1), 1, {"none": 1}),
        lambda index: index.search(vectors_of(1), 1, torch.ones(9, dtype=torch.bool)),
        lambda index: index.entry(9),
        lambda index: MilvusImageIndex.create(FILE, 4, index.engine.collection.name),
    ],
)
def test_what_is_refused_changes_nothing(change):
    index = MilvusImageIndex.create(FILE, 4, name())
    index.add(vectors_of(0, 2), ["a", "b"], metadata=[{"x": 1}, {}])
    with pytest.raises(GroundingError):
        change(index)
    assert list(index) == [("a", None, {"x": 1}), ("b", None, {})]
    assert index.search(vectors_of(0, 2), 1).positions.tolist() == [[0], [1]]


class Flaky:
    """A client of Milvus some of whose calls fail, before or after they are carried out."""

    def __init__(self, client, failing, error, carried_out=False):
        self.client, self.failing, self.error, self.carried_out = client, failing, error, carried_out

    def __getattr__(self, method):
        real = getattr(self.client, method)

        def call(*args, **options):
            if method != self.failing[0] or self.failing[1] <= 0:
                return real(*args, **options)
            self.failing[1] -= 1
            if self.carried_out:
                real(*args, **options)
            raise self.error

        return call


@pytest.fixture
def flaky(monkeypatch):
    import pymilvus

    client, away = pymilvus.MilvusClient, pymilvus.MilvusException(2, "Fail connecting to server on here")

    def break_down(method, times, carried_out=False, error=away):
        failing = [method, times]
        monkeypatch.setattr(pymilvus, "MilvusClient", Maker(client, lambda c: Flaky(c, failing, error, carried_out)))

    return break_down


class Maker:
    """The class of clients, whose objects are wrapped."""

    def __init__(self, client, wrap):
        self.client, self.wrap = client, wrap

    def __call__(self, *args, **options):
        return self.wrap(self.client(*args, **options))

    def __getattr__(self, attribute):
        return getattr(self.client, attribute)


PATIENT = MilvusServer(FILE, tries=3, pause=0.0)


@pytest.mark.parametrize("carried_out", [False, True])
@pytest.mark.parametrize(
    "method", ["insert", "upsert", "search", "query", "get", "create_collection", "rename_collection"]
)
def test_a_call_that_was_lost_is_made_again_on_a_new_connection(method, carried_out, flaky):
    flaky(method, 2, carried_out)
    index = MilvusImageIndex.create(PATIENT, 4, name())
    index.add(vectors_of(0, 3), list("abc"))
    assert index.search(vectors_of(0, 3), 1).positions.tolist() == [[0], [1], [2]]
    assert [id for id, _, _ in index] == list("abc") and len(index) == 3


def test_an_addition_that_fails_leaves_nothing_and_no_position_is_given_twice(flaky):
    collection = name()
    MilvusImageIndex.create(FILE, 4, collection)
    flaky("insert", 1, True, error=KeyboardInterrupt())
    index = MilvusImageIndex.open(PATIENT, collection)
    with pytest.raises(KeyboardInterrupt):
        index.add(vectors_of(0, 3), list("abc"))
    assert len(index) == 0 and not list(index)
    index.add(vectors_of(0, 1), ["a"])
    assert index.search(vectors_of(0), 1).positions.tolist() == [[3]]


def test_what_a_dead_process_left_is_deleted_by_the_next_that_writes():
    collection = name()
    index = MilvusImageIndex.create(FILE, 4, collection)
    rows = index.engine.collection
    rows.write_counter(type(rows.counter)(end=5, pending=(0, 5)))
    rows.upsert(
        [{"position": 2, "vector": [1.0, 0, 0, 0], "key": '"x"', "entry": {"id": {"string": "x"}}, "thumbnail": ""}]
    )
    again = MilvusImageIndex.open(FILE, collection)
    assert again.add(vectors_of(0), ["y"]) == ["y"] and [id for id, _, _ in again] == ["y"]
    assert again.search(vectors_of(0), 1).positions.tolist() == [[5]]


def test_a_collection_has_its_name_only_when_it_is_whole(flaky):
    import pymilvus

    collection = name()
    flaky("insert", 1, error=pymilvus.MilvusException(1, "disk full"))
    with pytest.raises(GroundingStateError, match="disk full"):
        MilvusIndex.create(FILE, vectors_of(0, 3), collection)
    assert not [one for one in pymilvus.MilvusClient(FILE).list_collections() if one.startswith(collection)]
    assert len(MilvusIndex.create(FILE, vectors_of(0, 3), collection)) == 3


def test_a_milvus_that_is_away_and_collections_of_something_else_are_said(tmp_path):
    with socket.socket() as taken:  # Bound and not listening: connections are refused.
        taken.bind(("127.0.0.1", 0))
        uri = f"http://root:secret@127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(GroundingStateError, match="cannot be reached") as caught:
            MilvusIndex.open(MilvusServer(uri, timeout=0.2, tries=2, pause=0.0))
    assert "secret" not in str(caught.value)
    client = Connection(MilvusServer(FILE))
    client.call(lambda c: c.create_collection("other", dimension=4))
    for words, call in (
        ("no collection 'none'", lambda: MilvusIndex.open(FILE, "none")),
        ("has the fields", lambda: MilvusIndex.open(FILE, "other")),
        ("is named with letters", lambda: MilvusIndex.open(FILE, "no name")),
        ("ends in .db", lambda: MilvusIndex.open(tmp_path / "images")),
    ):
        with pytest.raises(GroundingError, match=words):
            call()
    with pytest.raises(GroundingIndexError):
        MilvusImageIndex.create(FILE, 4, name()).entry(-1)
