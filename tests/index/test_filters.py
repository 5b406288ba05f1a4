import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from visual_ground.errors import GroundingError, GroundingValueError
from visual_ground.index.image_index import ImageIndex
from visual_ground.index.table.filters import COMPARISONS, kind_of

NAMES = st.sampled_from(["licence", "year", "x"])
NUMBERS = st.one_of(st.integers(-3, 3), st.sampled_from([0.5, 2.0, 2**62, 2**64, -(2**80), 2**53 + 1, 1e300]))
VALUES = st.one_of(NUMBERS, st.booleans(), st.sampled_from(["", "CC0", "CC BY", "é"]))
METADATA = st.dictionaries(NAMES, st.one_of(VALUES, st.none(), st.lists(st.integers(), max_size=1)))
# Whole columns of one type, which are compared as columns, as well as any mixture.
PLAIN = st.fixed_dictionaries({"licence": st.sampled_from(["CC0", "CC BY"]), "year": st.integers(-3, 3)})
CONDITIONS = st.one_of(
    VALUES,
    st.lists(VALUES, max_size=3),
    st.dictionaries(st.sampled_from(sorted(COMPARISONS)), st.one_of(NUMBERS, st.text(max_size=1)), min_size=1),
)
FILTERS = st.recursive(
    st.dictionaries(NAMES, CONDITIONS, max_size=2),
    lambda inner: st.one_of(
        st.fixed_dictionaries({"not": inner}),
        st.fixed_dictionaries({"or": st.lists(inner, max_size=3)}),
        st.fixed_dictionaries({"and": st.lists(inner, max_size=3)}),
    ),
    max_leaves=4,
)


def allows(filter, metadata):
    """The meaning of a filter, written once more and plainly."""
    return all(_allows(name, value, metadata) for name, value in filter.items())


def _allows(name, value, metadata):
    if name == "not":
        return not allows(value, metadata)
    if name in ("and", "or"):
        return (all if name == "and" else any)(allows(one, metadata) for one in value)
    comparisons = value if isinstance(value, dict) else {"in": value if isinstance(value, list) else [value]}
    return all(_holds(metadata.get(name), how, other) for how, other in comparisons.items())


def _holds(value, how, other):
    if how == "in":
        return any(_holds(value, "eq", one) for one in other)
    return kind_of(value) is not None and kind_of(value) == kind_of(other) and COMPARISONS[how](value, other)


@settings(suppress_health_check=list(HealthCheck))
@given(st.one_of(st.lists(METADATA, min_size=1, max_size=6), st.lists(PLAIN, min_size=1, max_size=6)), FILTERS)
def test_a_filter_allows_the_entries_that_it_says(metadata, filter):
    index = ImageIndex(torch.eye(len(metadata)), metadata=metadata)
    allowed = [i for i, values in enumerate(metadata) if allows(filter, values)]
    query = torch.ones(1, len(metadata))
    try:
        found = index.search(query, 9, filter)
    except GroundingValueError as error:
        assert "No entry has" in str(error) and not {"licence", "year", "x"} <= set().union(*metadata)
        return
    assert sorted(found.positions[0].tolist()) == allowed
    assert index.metadata == metadata
    chosen = index.search(query, 9, lambda values: allows(filter, values))
    assert sorted(chosen.positions[0].tolist()) == allowed


def test_ids_are_a_column():
    index = ImageIndex(torch.eye(4), ["a", "b", 3, 4])
    for filter, found in (({"id": "b"}, [1]), ({"id": ["a", 4]}, [0, 3]), ({"id": {"ge": 4}}, [3])):
        assert sorted(index.search(torch.ones(1, 4), 9, filter).positions[0].tolist()) == found


@pytest.mark.parametrize(
    "filter, words",
    [
        ({"colour": "red"}, r"\['colour'\].*\['id', 'year'\]"),
        ({"year": {"like": 3}}, "operators are"),
        ({"year": {"in": 3}}, '"in" takes a list'),
        ({"year": {}}, "compares with nothing"),
        ({"year": None}, "NoneType"),
        ({"year": float("nan")}, "nan"),
        ({"year": {"lt": True}}, "booleans"),
        ({"or": {"year": 3}}, "list of filters"),
        ({"not": 3}, "mapping"),
        ({3: 3}, "mapping"),
        (7, "filter must be"),
    ],
)
def test_a_filter_that_means_nothing_is_refused(filter, words):
    index = ImageIndex(torch.eye(2), metadata=[{"year": 1}, {"year": 2}])
    with pytest.raises(GroundingError, match=words):
        index.search(torch.eye(2), 1, filter)
