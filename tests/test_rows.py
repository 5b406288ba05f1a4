"""One way to read whatever a dataset is: training, evaluation and indexes see the same pictures and captions."""

import datasets
import numpy as np
import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import grounded
from tests.training.runs import ROWS
from visual_ground.errors import GroundingTypeError
from visual_ground.evaluation import EvaluationPairs
from visual_ground.indexing.sources import read_source
from visual_ground.rows import picture_of
from visual_ground.training.data.columns import Columns, open_rows
from visual_ground.vision.images import to_rgb


class ByNumber(torch.utils.data.Dataset):
    """A torch dataset that has rows by number, and nothing to iterate over."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        return self.rows[number % len(self.rows)]


def table(rows, pixels):
    """Return rows as a `datasets.Dataset` with pictures in files, or with their numbers in lists."""
    captions = [row["caption"] for row in rows]
    if pixels:
        return datasets.Dataset.from_dict(
            {"image": [np.asarray(to_rgb(row["image"])) for row in rows], "caption": captions}
        )
    found = datasets.Dataset.from_dict({"image": [row["image"] for row in rows], "caption": captions})
    return found.cast_column("image", datasets.Image())


def turned(batch):
    return {**batch, "image": [to_rgb(picture_of(image)).rotate(90) for image in batch["image"]]}


CHANGES = {
    "turned": lambda rows: rows.with_transform(turned),
    "as tensors": lambda rows: rows.with_format("torch"),
    "as arrays": lambda rows: rows.with_format("numpy"),
    "as a frame": lambda rows: rows.with_format("pandas"),
    "as a table": lambda rows: rows.with_format("arrow"),
    "backwards": lambda rows: rows.select(range(len(rows))[::-1]),
    "without the first": lambda rows: rows.select(range(1, len(rows))),
}


def seen_in_training(rows):
    columns = Columns()
    return [(to_rgb(columns.images(row)[0]), *columns.captions(row)) for row in open_rows(rows, columns)]


def seen_in_an_index(rows):
    return [(to_rgb(one.image), one.metadata["caption"]) for one in read_source(rows)]


def seen_in_evaluation(rows):
    pairs = EvaluationPairs(rows)
    return [(to_rgb(picture_of(row["image"])), row["caption"]) for row in pairs.pairs]


READERS = [seen_in_training, seen_in_an_index, seen_in_evaluation]


def as_bytes(seen):
    return [(image.tobytes(), caption) for image, caption in seen]


@pytest.mark.parametrize("reader", READERS)
@settings(max_examples=20)
@given(changes=st.lists(st.sampled_from(sorted(CHANGES)), max_size=4), pixels=st.booleans())
def test_formats_and_transforms_of_a_dataset_hold_in_whatever_order_they_were_set(reader, changes, pixels):
    wanted, rows, turns = [dict(row) for row in ROWS], table(ROWS, pixels), False
    for change in changes:
        rows = CHANGES[change](rows)
        turns = change == "turned" or (turns and not change.startswith("as "))
        wanted = wanted[::-1] if change == "backwards" else wanted[1:] if change == "without the first" else wanted
    if turns:
        wanted = [{**row, "image": to_rgb(row["image"]).rotate(90)} for row in wanted]
    assert as_bytes(reader(rows)) == as_bytes((to_rgb(row["image"]), row["caption"]) for row in wanted)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", [list, pandas.DataFrame, ByNumber])
def test_anything_with_rows_by_number_is_read_alike(reader, kind):
    assert as_bytes(reader(kind(ROWS))) == as_bytes((to_rgb(row["image"]), row["caption"]) for row in ROWS)


@pytest.mark.parametrize("reader", READERS)
def test_splits_and_columns_are_no_dataset_of_any_reader(reader):
    for several in (datasets.DatasetDict(train=table(ROWS, False)), {"image": [row["image"] for row in ROWS]}):
        with pytest.raises(GroundingTypeError, match=r"ds\['train'\]"):
            reader(several)


def test_pairs_to_evaluate_on_are_no_stream():
    with pytest.raises(GroundingTypeError, match="read by number"):
        EvaluationPairs(table(ROWS, False).to_iterable_dataset())


@pytest.mark.parametrize("value", [[[1, 2], [3]], ["a.png"], [], [1, 2], {"bytes": b""}, "a.png", None], ids=repr)
def test_what_is_no_picture_of_numbers_stays_as_it_is(value):
    assert picture_of(value) is value


def test_a_column_of_a_table_is_a_list_of_prompts():
    model, captions = grounded(), [row["caption"] for row in ROWS]
    wanted = model.embed_text(captions)
    columns = table(ROWS, False)["caption"], pandas.Series(captions), np.array(captions), tuple(captions)
    assert all(torch.equal(model.embed_text(column), wanted) for column in columns)
    for table_of_several in (pandas.DataFrame(ROWS), table(ROWS, False), {"caption": captions}):
        with pytest.raises(GroundingTypeError):
            model.embed_text(table_of_several)
