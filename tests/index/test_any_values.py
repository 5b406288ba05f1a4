"""Whatever is given as an id, an image or metadata: it comes back from the disk as it was, or is refused when given."""

import datetime
import decimal
import enum
import fractions
import os
import pathlib
import uuid
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.tiny import grounded, picture
from visual_ground import ImageIndex
from visual_ground.errors import GroundingError
from visual_ground.index.table.filters import parse_filter
from visual_ground.index.table.masks import rows_where
from visual_ground.index.table.rows import make_table
from visual_ground.indexing.build import BuildOptions, build_index


class Year(enum.IntEnum):
    NOW = 2026


class Licence(str, enum.Enum):
    FREE = "CC0"


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


CIRCLE = []
CIRCLE.append(CIRCLE)
ODD = [
    *(np.int64(3), np.float32(0.1), np.float64(0.1), np.bool_(True), np.str_("a"), np.arange(3), np.datetime64("2026")),
    *(np.float64("nan"), np.array("a.png"), pandas.NaT, pandas.NA, pandas.Timestamp("2026"), torch.ones(2)),
    *(decimal.Decimal("1.1"), decimal.Decimal("nan"), fractions.Fraction(1, 3), 1j, 10**400, 10**5000, -(2**63) - 1),
    *(b"a", bytearray(b"a"), {1}, frozenset([1]), (1, 2), [(1, 2)], {"a": {1: 2}}, {"a": (1,)}, range(3)),
    *(datetime.date(2026, 1, 1), datetime.timedelta(1), pathlib.Path("a"), uuid.UUID(int=1), Year.NOW, Licence.FREE),
    *("\ud800", {"a": "\udcff"}, float("inf"), [float("nan")], nested(2000), CIRCLE, print, MappingProxyType({"a": 1})),
    *(Image.new("RGB", (1, 1)), "", "a\0b", "a\r\nb", "\u2028", -0.0, 5e-324, 2**63, 2**63 - 1, True, None, [], {}),
]
VALUES = st.one_of(
    st.sampled_from(ODD),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    ),
)


def named(value):
    try:
        return repr(value)[:30]
    except (ValueError, RecursionError):
        return type(value).__name__


def comes_back(folder, **given_values):
    """Return an index of one value as it is given and as it is loaded; None where it is refused when given."""
    try:
        index = ImageIndex(torch.eye(2), **given_values)
    except GroundingError as error:
        assert len(str(error)) < 1000  # Whatever was given, the message can be read.
        return None
    index.save_pretrained(folder)
    return index, ImageIndex.from_pretrained(folder)


@given(VALUES)
def test_metadata_come_back_as_they_were_or_are_refused(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("index")
    for metadata in ([{"key": value}, {}], [{}, {"key": value, "other": 1}], [{"key": value}, {"key": "text"}]):
        if (both := comes_back(folder, metadata=metadata)) is not None:
            assert both[1].metadata == both[0].metadata == metadata
            assert str(both[1].metadata) == str(both[0].metadata)  # 1, 1.0 and True are equal, and not the same.


@given(VALUES, VALUES)
def test_ids_come_back_as_they_were_or_are_refused(tmp_path_factory, one, other):
    if (both := comes_back(tmp_path_factory.mktemp("index"), ids=[one, other])) is not None:
        assert both[1].ids == both[0].ids == [one, other] and {type(i) for i in both[1].ids} <= {int, str}
        assert both[1].find([one, other]) == {one: 0, other: 1}


# What has the form of a file is opened when it is embedded or saved.
FORMS = [one for one in ODD if not isinstance(one, (bytes, bytearray, Mapping))]


@pytest.mark.parametrize("value", FORMS, ids=named)
def test_images_are_kept_or_refused_before_anything_is_embedded(value, tmp_path):
    model = grounded()
    model.active.vision.encode = None  # Nothing may be run.
    both = comes_back(tmp_path, images=[value, None])
    if both is None:
        with pytest.raises(GroundingError):
            ImageIndex.build(model, [value])
        index = ImageIndex(torch.eye(2), images=["a.png", None])
        for change in (
            lambda: index.add(torch.eye(2), images=[value, None]),
            lambda: index.update([0], images=[value]),
        ):
            with pytest.raises(GroundingError):
                change()
        assert len(index) == 2 and index.images[0].endswith("a.png")
    else:
        assert both[1].images[1] is None and both[1].images[0] is not None or value is None


@pytest.mark.parametrize(
    "value", [Year.NOW, np.int64(2**40), 2**70, True, np.float64(1.5), Licence.FREE, "CC0"], ids=named
)
def test_filters_compare_with_numbers_and_texts_of_any_class(value):
    try:
        condition = parse_filter({"key": value})
    except GroundingError:
        return
    table, _ = make_table(["a", "b", "c"], None, [{"key": 2026}, {"key": "CC0"}, {}])
    assert rows_where(table, condition).tolist() == [value == 2026, value == "CC0", False]


def test_a_source_s_rows_lose_what_an_index_cannot_keep_and_nothing_else(tmp_path):
    rows = [{"image": Image.new("RGB", (4, 4), (9, 9, i)), "id": f"{i}", "odd": odd} for i, odd in enumerate(ODD)]
    build_index(grounded(), rows, tmp_path, BuildOptions(progress=False))
    index = ImageIndex.from_pretrained(tmp_path)
    assert len(index) == len(rows)
    for (_, _, metadata), odd in zip(index, ODD, strict=True):
        assert metadata in ({}, {"odd": odd})


def test_a_file_or_row_that_an_index_cannot_name_is_left_out_and_ends_no_build(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in (b"a.png", b"caf\xe9.png", b"z.png"):
        picture(1).save(tmp_path / "photos" / os.fsdecode(name))
    report = build_index(grounded(), tmp_path / "photos", tmp_path / "index", BuildOptions(progress=False))
    assert report.num_images == 2 and "half a character" in report.unreadable[0][1]
    assert report.unreadable[0][0].encode().endswith(rb"caf\udce9.png")  # A terminal can show it.
    with pytest.raises(GroundingError, match="d800"):  # The name of no file at all.
        build_index(grounded(), [str(tmp_path / "photos" / "a.png"), "\ud800.png"], tmp_path / "listed")
    rows = [{"image": picture(i), "id": one} for i, one in enumerate(("a", True, 2**64, "\udcff", 7))]
    report = build_index(grounded(), rows, tmp_path / "rows", BuildOptions(progress=False))
    assert len(report.unreadable) == 3 and ImageIndex.from_pretrained(tmp_path / "rows").ids == ["a", 7]
