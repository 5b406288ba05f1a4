"""Answers with pictures against references: edit distance, Kendall scores, and RAG-IGBench's files."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.evaluation.nearness import write_images
from tests.tiny import grounded
from visual_ground import evaluate
from visual_ground.errors import GroundingFileError, GroundingValueError
from visual_ground.evaluation.running.task import Evaluation
from visual_ground.evaluation.tasks.answers.interleaved import Interleaved, edit_score, kendall_score, weighted

ENTRIES = [
    {
        "id": "1",
        "query": "w5 w6",
        "documents": ["w10 w11", "w12"],
        "images": [["1/1/IMG#1", "1/1/IMG#2"], ["1/2/IMG#3"]],
        "gt_answer": "w9 ![](IMG#3) w8 ![a](IMG#1)",
        "category": ["Finance", "what-is"],
    },
    {"id": 2, "query": "w7", "documents": ["w13"], "images": [[]], "gt_answer": "w4", "category": ["", ""]},
]


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "images" / "1" / "1", ["IMG#1.png", "IMG#2.png"])
    write_images(tmp_path / "images" / "1" / "2", ["IMG#3.jpg"])
    write(tmp_path, ENTRIES)
    return tmp_path


def write(folder, entries):
    (folder / "data.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def scores_of(records):
    return {name: [one[0] for one in units] for name, units in Interleaved.score(None, records).values.items()}


def test_scores_worked_out_by_hand():
    record = {"id": "1", "answer": "", "reference": [3, 1], "images": 3}
    for shown, edit, kendall in [
        ([3, 1], 100, 100 * (1 + 0.5 / 3) / 1.5),
        ([1, 3], 0, 0),  # Two replaced, and the only pair the wrong way round.
        ([3, 2, 1], 200 / 3, 100 / 3 * (1 + 0.5 / 3) / 1.5),  # One deleted; one of three pairs.
        ([1], 50, 50 * (1 + 0.5 / 3) / 1.5),
        ([], 0, 0),
    ]:
        found = scores_of([{**record, "shown": shown}])
        assert found["edit"] == pytest.approx([edit]) and found["kendall"] == pytest.approx([kendall]), shown
    nothing = {"id": "1", "answer": "", "reference": [], "shown": [], "images": 0}
    assert scores_of([nothing]) == {"edit": [100.0], "kendall": [100.0]}


pictures = st.lists(st.integers(1, 6), max_size=6)


def slow_distance(one, other):
    """Return the edit distance by its definition."""
    if not one or not other:
        return len(one) + len(other)
    if one[0] == other[0]:
        return slow_distance(one[1:], other[1:])
    return 1 + min(slow_distance(one[1:], other), slow_distance(one, other[1:]), slow_distance(one[1:], other[1:]))


@given(pictures, st.lists(st.integers(1, 6), max_size=6, unique=True))
def test_scores_are_from_0_to_1_and_1_for_the_reference_itself(shown, reference):
    distance, longest = slow_distance(shown, reference), max(len(shown), len(reference), 1)
    assert edit_score(shown, reference) == pytest.approx(1 - distance / longest)
    assert edit_score(shown, reference) == pytest.approx(edit_score(reference, shown))
    assert edit_score(reference, reference) == kendall_score(reference, reference) == 1
    assert 0 <= kendall_score(shown, reference) <= 1
    assert 0 <= weighted(kendall_score(shown, reference), 6, len(reference)) <= 1


def test_a_model_answers_with_the_pictures_of_its_query(folder):
    model = grounded()
    report = evaluate(
        model, "interleaved", data=folder, ret_bias=100.0, max_images=2, max_new_tokens=12, progress=False
    )
    answers = {one["id"]: json.loads(one["model_answer"])["answer"] for one in report.files["answers.json"]}
    assert answers["1"].count("![](IMG#") == 2 and "IMG" not in answers["2"]
    assert report.counts == {"units": 2, "images": 3} and not report.missing
    saved = report.save(folder / "report.json")
    assert [path.name for path in saved] == ["report.json", "report-answers.json"]
    silent = evaluate(model, "interleaved", data=folder, ret_bias=-100.0, max_new_tokens=3, progress=False)
    assert silent.metrics["edit"] == silent.metrics["kendall"] == 50.0


def test_documents_that_do_not_fit_are_left_out(folder):
    model = grounded("gpt2")
    limit = model.frozen_lm.max_length
    write(folder, [{**ENTRIES[0], "documents": ["w10 " * 40, "w11 " * limit]}])
    metrics = Evaluation(Interleaved(folder, max_new_tokens=4))(model)
    assert set(metrics) == {"edit", "kendall"}


def test_what_is_missing_or_wrong_is_named(folder):
    (folder / "images" / "1" / "2" / "IMG#3.jpg").unlink()
    report = evaluate(grounded(), "interleaved", data=folder, max_new_tokens=2, progress=False)
    assert report.missing["queries without a picture of their reference"] == ["1"] and report.counts["units"] == 1
    for change, match in [
        ({"gt_answer": "![](IMG#4)"}, "entry 0: gt_answer shows IMG#4, and there are 3 images"),
        ({"documents": ["w4"]}, "1 documents and 2 lists of images"),
        ({"images": "none"}, "'images' must be a list, got a string"),
    ]:
        write(folder, [{**ENTRIES[0], **change}])
        with pytest.raises(GroundingValueError, match=match):
            Interleaved(folder)
    write(folder, [ENTRIES[0], ENTRIES[0]])
    with pytest.raises(GroundingValueError, match="come twice"):
        Interleaved(folder)
    with pytest.raises(GroundingValueError, match="max_new_tokens"):
        Interleaved(folder, max_new_tokens=0)
    (folder / "data.jsonl").write_text("{}\n{")
    with pytest.raises(GroundingFileError, match="line 2, is no JSON"):
        Interleaved(folder)
    (folder / "data.jsonl").unlink()
    with pytest.raises(GroundingFileError, match="one file 'data.jsonl'"):
        Interleaved(folder)
