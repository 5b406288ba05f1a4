"""Whatever a dataset is and lacks: rows that cannot be used are left out by name, in every way of reading them."""

import datasets
import numpy as np
import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import grounded, picture
from tests.training.runs import ROWS, arguments
from visual_ground import GroundingTrainer
from visual_ground.errors import GroundingError, GroundingFileError, GroundingTypeError
from visual_ground.evaluation import EvaluationPairs
from visual_ground.indexing.build import BuildOptions, build_index
from visual_ground.training.data.columns import Columns, forbidden_words, open_rows, usable_rows
from visual_ground.training.data.loading import column_names, load_rows
from visual_ground.training.data.rows import is_missing
from visual_ground.training.data.skipped import Skipped
from visual_ground.training.data.streams import prepare_stream
from visual_ground.training.setup import data_preparation

FORBIDDEN = Columns(forbidden=("[RET]",))


class Endless(torch.utils.data.Dataset):
    """A torch dataset that has a length and never raises IndexError."""

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, number):
        return ROWS[number % len(ROWS)]


class Keyed(Endless):
    """A torch dataset over a dictionary."""

    def __getitem__(self, number):
        return dict(enumerate(ROWS))[number]


def usable(rows, columns=FORBIDDEN, limit=1.0):
    skipped = Skipped(limit, 100)
    rows = open_rows(rows, columns)
    return usable_rows(rows, columns, skipped), skipped.names


MISSING = [None, float("nan"), np.float32("nan"), pandas.NA, pandas.NaT, "", " ", {"bytes": None, "path": None}]


@pytest.mark.parametrize("value", [*MISSING, [], [None], [float("nan"), ""]], ids=repr)
def test_a_row_without_an_image_is_left_out_by_name(value):
    rows = [ROWS[0], {**ROWS[1], "image": value}, ROWS[2]]
    assert usable(rows) == ([0, 2], ["row 1: it has no image"])


@settings(max_examples=25)
@given(st.lists(st.sampled_from(["a.png", "", " ", None]), min_size=1, max_size=5), st.booleans())
def test_a_table_and_a_list_of_rows_lack_the_same_images(images, listed):
    values = [[image, None] for image in images] if listed else images
    rows = [{"image": value, "caption": "w4"} for value in values]
    features = datasets.Features(
        {
            "image": datasets.List(datasets.Value("string")) if listed else datasets.Value("string"),
            "caption": datasets.Value("string"),
        }
    )
    table = datasets.Dataset.from_list(rows, features=features)
    assert usable(rows) == usable(table)
    assert usable(table)[0] == [i for i, image in enumerate(images) if not is_missing(image)]


def test_an_image_column_shows_what_it_lacks_without_being_read():
    rows = [{"image": picture(i) if i % 2 else None, "caption": "w4"} for i in range(4)]
    table = datasets.Dataset.from_list(
        rows, features=datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    )
    assert usable(table)[0] == [1, 3]
    assert usable(table.select([3, 0]))[0] == [0]


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
def test_rows_without_an_image_are_left_out_with_and_without_a_cache(cache, tmp_path):
    rows = [*ROWS, {"image": None, "caption": "w4"}, {"image": [], "caption": "w4"}]
    model, args = grounded(), arguments(tmp_path, cache_features=cache, max_skipped=0.2)
    assert len(data_preparation(model, args).examples(rows, sample=True)) == len(ROWS)
    with pytest.raises(GroundingError, match="row 12: it has no image"):
        data_preparation(model, arguments(tmp_path, cache_features=cache)).examples(rows, sample=True)


TEXTS = ["w4 [RET] w5", "w4 " + chr(0xD83D), "w4 \ufffd", " "]


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
@pytest.mark.parametrize("column", ["caption", "request", "question"])
def test_a_text_that_cannot_be_trained_on_is_left_out_by_name_before_training(text, column):
    rows = [ROWS[0], {**ROWS[1], column: text}, {**ROWS[2], column: [text, "w7"]}]
    kept, names = usable(rows)
    if column != "caption" and not text.strip():
        assert kept == [0, 1, 2]  # An optional text that is empty is none.
    else:
        assert kept == [0, 2] and len(names) == 1
        assert names[0].startswith(f"row 1: its {column} ")
    assert FORBIDDEN.captions({"caption": [text, "w7"]}) == ["w7"]


def test_a_stream_leaves_out_the_same_rows(tmp_path):
    bad = [{**ROWS[0], "caption": "w4 [RET]"}, {**ROWS[1], "image": None}]
    rows = datasets.IterableDataset.from_generator(lambda: iter([*ROWS[:3], *bad]))
    for cache in (True, False):
        args = arguments(tmp_path, cache_features=cache, max_skipped=1.0)
        stream = prepare_stream(rows, data_preparation(grounded(), args))
        assert {example["caption"] for example in stream.take(7)} == {row["caption"] for row in ROWS[:3]}


def test_what_no_caption_may_contain_is_ret_and_tokens_without_an_embedding():
    model = grounded()
    model.tokenizer.add_tokens(["<added>"])
    number = model.tokenizer.convert_tokens_to_ids("<added>")
    words = forbidden_words(model)
    assert words[0] == model.config.ret_token
    assert ("<added>" in words) == (number >= model.frozen_lm.vocabulary.num_rows)


@pytest.mark.parametrize("rows", [Endless(), Keyed(), pandas.DataFrame(ROWS)], ids=["endless", "keyed", "frame"])
def test_anything_with_rows_by_number_is_read_once_through(rows):
    assert usable(rows)[0] == list(range(len(ROWS)))


class OneByOne(torch.utils.data.IterableDataset):
    """A torch dataset without numbers."""

    def __iter__(self):
        return iter(ROWS)


class Damaged(Endless):
    """A torch dataset that opens its pictures itself, and fails where they are damaged."""

    def __init__(self, faults):
        self.faults = faults

    def __getitem__(self, number):
        fault = self.faults.get(number)
        if isinstance(fault, Exception):
            raise fault
        return ROWS[number] if number not in self.faults else fault


FAULTS = {
    "raises OSError": OSError("image file is truncated"),
    "raises KeyError": KeyError("image"),
    "raises IndexError": IndexError("list index out of range"),
    "is None": None,
    "is a tuple": ("a.png", "w4"),
    "lacks its image": {"caption": "w4"},
    "lacks its caption": {"image": picture(1)},
    "lacks all": {},
}


@pytest.mark.parametrize("place", [0, 5, 11])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
def test_a_row_that_a_dataset_itself_cannot_read_is_left_out_by_name(cache, fault, place, tmp_path):
    if place == 0 and not isinstance(fault, Exception):
        pytest.skip("a first row of another kind says that this is no dataset")
    model, rows = grounded(), Damaged({place: fault})
    arguments_of = lambda limit: arguments(tmp_path, cache_features=cache, max_skipped=limit)  # noqa: E731
    examples = data_preparation(model, arguments_of(0.2)).examples(rows, sample=True)
    seen = {examples[i]["caption"] for i in range(len(examples))}
    assert seen == {row["caption"] for i, row in enumerate(ROWS) if i != place}
    with pytest.raises(GroundingError, match=rf"row {place}: it"):
        data_preparation(model, arguments_of(0.01)).examples(rows, sample=True)
    report = build_index(model, rows, tmp_path / "index", BuildOptions(progress=False))
    kept = len(ROWS) if fault == {"image": FAULTS["lacks its caption"]["image"]} else len(ROWS) - 1
    assert report.num_images == kept
    if "caption" not in (fault if isinstance(fault, dict) else {}):
        with pytest.raises(GroundingError):
            EvaluationPairs(rows).read(model)


def test_a_row_that_cannot_be_read_any_more_is_passed_over_in_training(tmp_path):
    rows = Damaged({})
    args = arguments(tmp_path, cache_features=False, data_dependent_init=False, max_steps=3, max_skipped=0.5)
    trainer = GroundingTrainer(grounded(), args, rows)
    rows.faults = {number: OSError("gone") for number in (2, 3)}
    trainer.train()
    assert trainer.state.global_step == 3 and any("gone" in name for name in trainer.skipped.names)


def test_a_stream_that_cannot_be_read_is_one_error(tmp_path):
    (tmp_path / "broken.json").write_text('[{"image": "0.png", "caption": "a"}, {"image": "1.png", "capt')
    rows = load_rows(str(tmp_path / "broken.json"), streaming=True)
    for read in (column_names, lambda rows: open_rows(rows, Columns())):
        with pytest.raises(GroundingFileError):
            read(rows)
    with pytest.raises(GroundingFileError, match="ZeroDivisionError"):
        open_rows(table().to_iterable_dataset().map(lambda row: 1 / 0), Columns())


def test_a_dataset_of_which_nothing_can_be_read_is_named():
    with pytest.raises(GroundingError, match="No row of the dataset can be read.*gone"):
        open_rows(Damaged(dict.fromkeys(range(len(ROWS)), OSError("gone"))), Columns())


@pytest.mark.parametrize(
    "rows", [{}, {"a": datasets.IterableDataset.from_generator(lambda: iter(ROWS))}], ids=["none", "stream"]
)
def test_what_cannot_be_evaluated_on_is_named_before_the_first_step(rows, tmp_path):
    with pytest.raises(GroundingError, match="eval_dataset="):
        GroundingTrainer(grounded(), arguments(tmp_path), ROWS, eval_dataset=rows)


@pytest.mark.parametrize(
    "rows, words",
    [
        (torch.utils.data.ChainDataset([OneByOne()]), "ChainDataset.*from_generator"),
        (OneByOne(), "from_generator makes a stream"),
        (datasets.DatasetDict(train=datasets.Dataset.from_list([{"caption": "w4"}])), r"DatasetDict.*ds\['train'\]"),
        ({"image": [1], "caption": ["w4"]}, "dict.*from_dict"),
        ("photos", "str.*load_dataset"),
        ([("a.png", "w4")], "Row 0 of the dataset is a tuple"),
        (iter(ROWS), "len"),
    ],
    ids=["chain", "iterable", "splits", "columns", "name", "tuples", "iterator"],
)
def test_what_is_no_dataset_is_named(rows, words):
    with pytest.raises(GroundingTypeError, match=words):
        open_rows(rows, Columns())


def table(**columns):
    rows = {"image": [row["image"] for row in ROWS], "caption": [row["caption"] for row in ROWS], **columns}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def test_a_transform_is_applied_and_has_features_of_its_own(tmp_path):
    def turned(batch):
        return {
            **batch,
            "image": [image.rotate(90) for image in batch["image"]],
            "caption": ["w7"] * len(batch["image"]),
        }

    model, args = grounded(), arguments(tmp_path)
    plain = data_preparation(model, args).examples(table(), sample=False)
    changed = data_preparation(model, args).examples(table().with_transform(turned), sample=False)
    assert {changed[i]["caption"] for i in range(len(ROWS))} == {"w7"}
    as_list = data_preparation(model, args).examples(
        [{"image": row["image"].rotate(90), "caption": "w7"} for row in ROWS], sample=False
    )
    for i in range(3):
        assert torch.equal(changed[i]["image_features"], as_list[i]["image_features"])
        assert not torch.equal(changed[i]["image_features"], plain[i]["image_features"])
    uncached = data_preparation(model, arguments(tmp_path, cache_features=False))
    assert uncached.examples(table().with_transform(turned), sample=False)[0]["image"].tobytes() == (
        ROWS[0]["image"].rotate(90).tobytes()
    )


def test_a_format_hides_the_columns_that_it_leaves_out():
    rows = table(request=["w5"] * len(ROWS))
    rows.set_format("numpy", columns=["image", "caption"])
    assert "request" not in open_rows(rows, Columns())[0]
    rows.set_format("numpy", columns=["image", "caption"], output_all_columns=True)
    assert "request" in open_rows(rows, Columns())[0]


def test_several_evaluation_datasets_are_evaluated_by_name(tmp_path):
    args = arguments(tmp_path, num_logged_examples=0)
    trainer = GroundingTrainer(grounded(), args, eval_dataset={"a": ROWS[:4], "b": ROWS[4:]})
    metrics = trainer.evaluate()
    alone = GroundingTrainer(trainer.grounded, args, eval_dataset=ROWS[:4]).evaluate()
    wanted = {f"eval_a_{name[5:]}": value for name, value in alone.items() if name != "epoch"}
    assert wanted == {name: value for name, value in metrics.items() if name.startswith("eval_a_")}
    assert "eval_b_loss" in metrics and "eval_loss" not in metrics


def test_a_table_in_lines_is_read_line_by_line_and_what_is_no_utf8_is_named(tmp_path):
    path = tmp_path / "pairs.tsv"
    lines = ["caption\timage", '"a cat\t1.png', "a caf\udce9\t2.png", 'a hat"\t3.png']
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    for streaming in (False, True):
        rows = load_rows(str(path), streaming=streaming)
        assert [row["caption"] for row in rows] == ['"a cat', "a caf\ufffd", 'a hat"']
    assert usable(load_rows(str(path)))[1] == ["row 1: its caption has characters that could not be read as UTF-8"]
