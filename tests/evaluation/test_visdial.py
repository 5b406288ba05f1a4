"""VisDial: answers ranked by likelihood, retrieval both ways, and the three faults of the published scripts."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluation.nearness import write_images
from tests.tiny import grounded
from visual_ground import evaluate
from visual_ground.errors import GroundingFileError, GroundingValueError
from visual_ground.evaluation.metrics import all_ranks, ndcg
from visual_ground.evaluation.tasks.retrieval.visdial import VisDial

IDS = [184613, 7, 32]
ROUNDS, OPTIONS = 3, 4
QUESTIONS = [f"w{10 + i} w5" for i in range(9)]
ANSWERS = [f"w{30 + i} w{41 + 2 * i}"[: 3 + 4 * (i % 2)] for i in range(12)]
DIALOGS = "visdial_1.0_val.json"
DENSE = "visdial_1.0_val_dense_annotations.json"
RELEVANCE = [0.0, 0.6, 1.0, 0.2]


def options_of(dialog, number):
    return [(3 * dialog + 5 * number + i) % len(ANSWERS) for i in range(OPTIONS)]


def right_of(dialog, number):
    return (dialog + 2 * number) % OPTIONS


def content():
    dialogs = []
    for d, image_id in enumerate(IDS):
        turns = []
        for r in range(ROUNDS):
            options, right = options_of(d, r), right_of(d, r)
            turn = {"question": ROUNDS * d + r, "answer": options[right], "answer_options": options, "gt_index": right}
            turns.append(turn)
        dialogs.append({"image_id": image_id, "caption": "w4", "dialog": turns})
    data = {"questions": QUESTIONS, "answers": ANSWERS, "dialogs": dialogs}
    return {"version": "1.0", "split": "val", "data": data}


def dense(round_id=2):
    return [{"image_id": image_id, "round_id": round_id, "gt_relevance": RELEVANCE} for image_id in IDS[:2]]


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "val", [f"VisualDialog_val2018_{image_id:012d}.png" for image_id in IDS])
    write(tmp_path, DIALOGS, content())
    write(tmp_path, DENSE, dense())
    return tmp_path


def write(folder, name, values):
    (folder / name).write_text(json.dumps(values))


def image_of(folder, dialog):
    return str(folder / "val" / f"VisualDialog_val2018_{IDS[dialog]:012d}.png")


def prompt_of(folder, dialog, number):
    text = ""
    for r in range(number):
        text += f"Q: {QUESTIONS[ROUNDS * dialog + r]}?\nA: {ANSWERS[options_of(dialog, r)[right_of(dialog, r)]]}\n"
    return [image_of(folder, dialog), f"{text}Q: {QUESTIONS[ROUNDS * dialog + number]}?\nA:"]


def ranks(model, folder, dialog, number, score):
    """Return the options' ranks, counted one by one."""
    texts = [f" {ANSWERS[i]}" for i in options_of(dialog, number)]
    scores = [score(prompt_of(folder, dialog, number), text) for text in texts]
    return [sum(other >= one for other in scores) for one in scores]


def gain(ranked):
    """Return NDCG as its definition says: of the best three in order, which are all that are relevant."""
    best_first = [RELEVANCE[ranked.index(rank)] for rank in (1, 2, 3)]
    discounts = [1, 1 / math.log2(3), 1 / 2]
    ideal = 1.0 + 0.6 / math.log2(3) + 0.2 / 2
    return 100 * sum(value * discount for value, discount in zip(best_first, discounts, strict=True)) / ideal


def answers(model, folder, score, shift=1):
    ranked = [[ranks(model, folder, d, r, score) for r in range(ROUNDS)] for d in range(len(IDS))]
    right = [ranked[d][r][right_of(d, r)] for d in range(len(IDS)) for r in range(ROUNDS)]
    flat = [one for of_dialog in ranked for one in of_dialog]
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    return {
        "mrr": 100 * mean([1 / rank for rank in right]),
        "mean_rank": mean(right),
        **{f"answer_r{k}": 100 * mean([rank <= k for rank in right]) for k in (1, 5, 10)},
        "ndcg": mean([gain(flat[ROUNDS * d + shift]) for d in (0, 1)]),
    }


def retrieval(model, folder, vectors):
    images = torch.cat([model.embed_images([image_of(folder, d)]) for d in range(len(IDS))])
    found = {}
    for way, scores in (("dialog_to_image", vectors @ images.T), ("image_to_dialog", images @ vectors.T)):
        places = [sum(float(s) >= float(row[i]) for s in row) for i, row in enumerate(scores)]
        for k in (1, 5, 10):
            found[f"{way}_r{k}"] = 100 * sum(place <= k for place in places) / len(places)
    return found


def transcripts():
    said = lambda d, r: f"Q: {QUESTIONS[ROUNDS * d + r]}? A: {ANSWERS[options_of(d, r)[right_of(d, r)]]}."  # noqa: E731
    return [" ".join(said(d, r) for r in range(ROUNDS)) for d in range(len(IDS))]


@pytest.mark.parametrize("family", ["gpt2", "mamba"])
def test_numbers_are_those_of_every_answer_alone(folder, family):
    model = grounded(family)
    expected = answers(model, folder, lambda prompt, text: float(model.log_likelihood([prompt], [text])))
    expected |= retrieval(model, folder, model.embed_text(transcripts()))
    report = evaluate(model, "visdial", data=folder, batch_size=2, progress=False)
    assert report.metrics == pytest.approx(expected, abs=1e-6)
    assert report.counts == {"units": 3, "rounds": 9}
    assert report.missing == {"dialogs without dense annotations, not in ndcg": ["32"]}


def test_published_repeats_the_three_faults(folder):
    model = grounded()

    def score(prompt, text):
        encoded, lengths = model.processor.encode_continuations([prompt], [text])
        batch = model.processor.batch(encoded)
        logits = model(**batch).logits[0].log_softmax(-1)
        ids = batch["input_ids"][0]
        return sum(float(logits[i, ids[i]]) for i in range(len(ids) - lengths[0], len(ids)))

    expected = answers(model, folder, torch.no_grad()(score), shift=2)
    # An LM without a caption prompt reads a caption as the published script does.
    vectors = grounded(caption_prompt="").embed_text(transcripts())
    both = retrieval(model, folder, vectors)
    expected |= {f"{way}_r{k}": both[f"image_to_dialog_r{k}"] for way in both_ways() for k in (1, 5, 10)}
    report = evaluate(model, "visdial", data=folder, variant="published", progress=False)
    assert report.metrics == pytest.approx(expected, abs=1e-6)
    assert report.dataset == "VisDial 1.0 (published protocol)"


def both_ways():
    return ("dialog_to_image", "image_to_dialog")


def test_parts_can_be_measured_alone(folder):
    model = grounded()
    whole = evaluate(model, "visdial", data=folder, progress=False).metrics
    one = evaluate(model, "visdial", data=folder, part="answers", progress=False).metrics
    two = evaluate(model, "visdial", data=folder, part="retrieval", progress=False)
    assert whole == {**one, **two.metrics} and not set(one) & set(two.metrics)
    assert two.primary_metric in two.metrics and not two.missing


def test_images_and_annotations_may_be_missing(folder):
    (folder / DENSE).unlink()
    (folder / "val" / f"VisualDialog_val2018_{7:012d}.png").unlink()
    report = evaluate(grounded(), "visdial", data=folder, progress=False)
    assert "ndcg" not in report.metrics and report.counts["units"] == 2
    assert report.missing["images that are not there"] == ["7"]


def test_what_is_wrong_with_the_files_is_named(folder):
    good = content()
    for change, match in [
        (lambda c: c.update(split="test"), "the split 'test'; 'val' is needed"),
        (lambda c: c["data"].pop("answers"), "data has no 'answers', only"),
        (lambda c: c["data"]["dialogs"].append(c["data"]["dialogs"][0]), r"come twice: \[184613\]"),
        (lambda c: c["data"]["dialogs"][1]["dialog"][2].update(gt_index=4), "dialog 1, round 2: gt_index is 4, and"),
        (
            lambda c: c["data"]["dialogs"][0]["dialog"][0].update(question=-1),
            "round 0: question is -1, and there are 9",
        ),
        (lambda c: c["data"]["dialogs"][0]["dialog"][0].update(answer=9), "the answer is 9 and gt_index leads to 0"),
        (lambda c: c["data"]["dialogs"][0].update(dialog=[]), "dialog 0 has no rounds"),
    ]:
        broken = json.loads(json.dumps(good))
        change(broken)
        write(folder, DIALOGS, broken)
        with pytest.raises(GroundingValueError, match=match):
            VisDial(folder)
    write(folder, DIALOGS, good)
    for annotations, match in [
        ([{**dense()[0], "image_id": 5}], "image_id 5 is in no dialog"),
        (dense(round_id=0), "round_id - 1 is -1"),
        ([{**dense()[0], "gt_relevance": [1.0]}], "1 gt_relevance for 4 answer options"),
        ([{**dense()[0], "gt_relevance": [None] * 4}], "numbers from 0 to 1"),
        ([dense()[0]] * 2, "come twice"),
    ]:
        write(folder, DENSE, annotations)
        with pytest.raises(GroundingValueError, match=match):
            VisDial(folder)
    (folder / DIALOGS).unlink()
    with pytest.raises(GroundingFileError, match="must hold one file 'visdial_1.0_val.json'"):
        VisDial(folder)


def test_the_check_value_of_ndcg():
    assert ndcg([1.0, 0.5, *[0.0] * 98], [2, 1, *range(3, 101)]) == pytest.approx(0.8597, abs=5e-5)
    assert ndcg([0.0, 0.0], [1, 2]) is None


scores = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=9)


@settings(max_examples=60)
@given(scores, st.randoms(use_true_random=False), st.data())
def test_the_order_of_candidates_changes_no_rank_and_ties_count_against_the_right_one(values, random, data):
    order = list(range(len(values)))
    random.shuffle(order)
    found = all_ranks(values)
    assert all_ranks([values[i] for i in order]) == [found[i] for i in order]
    right = data.draw(st.integers(0, len(values) - 1))
    others = values[:right] + values[right + 1 :]
    assert found[right] == 1 + sum(other >= values[right] for other in others)
    relevance = data.draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=len(values), max_size=len(values)))
    gain = ndcg(relevance, found)
    assert gain == ndcg([relevance[i] for i in order], [found[i] for i in order]) or gain == pytest.approx(
        ndcg([relevance[i] for i in order], [found[i] for i in order])
    )
    assert gain is None or 0 <= gain <= 1 + 1e-9


def test_scores_that_are_no_numbers_have_no_ranks():
    with pytest.raises(GroundingValueError, match="some are NaN"):
        all_ranks([0.0, float("nan")])
