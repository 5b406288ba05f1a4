"""Evaluators: the same numbers as the functions below them, and good errors."""

import pytest
import torch

from tests.tiny import grounded, picture
from visual_ground.errors import GroundingTypeError, GroundingValueError
from visual_ground.evaluation import (
    CaptionPairEvaluator,
    EvaluationPairs,
    Evaluator,
    RetrievalEvaluator,
    caption_pair_accuracy,
    recall_at,
    retrieval_recall,
)
from visual_ground.evaluation.base import as_evaluators, run_evaluators
from visual_ground.evaluation.pairs import image_features

PAIRS = [{"image": picture(i), "caption": f"w{10 + i} w{20 + 2 * i} w9"} for i in range(7)]


class Constant:
    """An evaluator without a base class."""

    primary_metric = "score"

    def __init__(self, name, **metrics):
        self.name, self.metrics = name, metrics

    def __call__(self, model):
        return self.metrics


def test_recall_counts_ties_as_misses():
    scores = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert recall_at(scores, (1, 2, 3)) == pytest.approx({"r1": 100 / 3, "r2": 200 / 3, "r3": 100.0})


@pytest.mark.parametrize("batch_size", [2, 64])
def test_evaluators_give_what_the_functions_give(batch_size):
    model = grounded()
    pairs = EvaluationPairs(PAIRS, batch_size)
    captions, features = pairs.read(model)
    assert captions == [pair["caption"] for pair in PAIRS]
    assert torch.allclose(features, model.vision(model.vision.preprocess([pair["image"] for pair in PAIRS])))
    found = RetrievalEvaluator(pairs, batch_size=batch_size)(model)
    recalls = retrieval_recall(model, captions, features)
    assert found == {f"{way}_{rank}": v for way, values in recalls.items() for rank, v in values.items()}
    accuracy = caption_pair_accuracy(model, captions, features)
    assert CaptionPairEvaluator(PAIRS, batch_size=batch_size)(model) == {"caption_pair_accuracy": accuracy}
    for evaluator in (RetrievalEvaluator(PAIRS), CaptionPairEvaluator(PAIRS)):
        assert isinstance(evaluator, Evaluator) and evaluator.primary_metric in evaluator(model)


@pytest.mark.parametrize("name", ["llama_untied", "qwen2_tied"])  # Qwen2's [RET] takes a row that the LM has.
def test_ret_takes_no_part_in_the_likelihood_of_captions(name):
    model = grounded(name)
    accuracy = CaptionPairEvaluator(PAIRS, wrong_images=8)
    before = accuracy(model)
    prompts, words = [["w1", picture(0)], ["w2", picture(1)]], ["w5 w6", "w7"]
    free = model.log_likelihood(prompts, words)
    with torch.no_grad():
        model.adapter.ret_output.mul_(30)
    assert accuracy(model) == before
    assert not torch.allclose(model.log_likelihood(prompts, words), free, atol=1e-2)


def test_images_are_encoded_once_per_encoder(monkeypatch):
    model, other = grounded(), grounded("qwen2_tied")
    encoded = []
    monkeypatch.setattr(
        "visual_ground.evaluation.pairs.image_features",
        lambda model, pairs, size: encoded.append(len(pairs)) or image_features(model, pairs, size),
    )
    pairs = EvaluationPairs(PAIRS, batch_size=5)
    for evaluator in (RetrievalEvaluator(pairs), CaptionPairEvaluator(pairs), RetrievalEvaluator(pairs)):
        evaluator(model)
    assert encoded == [5, 2]
    pairs.read(other)
    assert encoded == [5, 2, 5, 2]


def test_features_may_be_given_instead_of_images():
    model = grounded()
    features = image_features(model, PAIRS)
    given = [
        {"caption": pair["caption"], "image_features": list(map(float, row))}
        for pair, row in zip(PAIRS, features, strict=True)
    ]
    assert torch.allclose(image_features(model, given), features)
    assert RetrievalEvaluator(given)(model) == RetrievalEvaluator(PAIRS)(model)


def test_names_are_put_before_metrics():
    model = grounded()
    results = run_evaluators(model, [Constant("one", score=1.0, other=2.0), Constant("two", score=3.0)])
    assert results == {"one": 1.0, "one_score": 1.0, "one_other": 2.0, "two": 3.0, "two_score": 3.0}
    assert as_evaluators(None) == [] and len(as_evaluators(Constant("one"))) == 1
    with pytest.raises(GroundingValueError, match="'one' returned .*other.*'score'"):
        run_evaluators(model, [Constant("one", other=2.0)])
    with pytest.raises(GroundingValueError, match="name of its own"):
        as_evaluators([Constant("one"), Constant("one")])
    with pytest.raises(GroundingTypeError, match="got function"):
        as_evaluators(lambda model: {})


def test_what_is_no_pair_is_named():
    model = grounded()
    for pairs, match in [
        ([{"image": picture(0), "text": "w4"}], r"got None in \['image', 'text'\]"),
        ([{"image": picture(0), "caption": ["w4", "w5"]}], r"got \['w4', 'w5'\]"),
    ]:
        with pytest.raises(GroundingTypeError, match=match):
            RetrievalEvaluator(pairs)(model)
    with pytest.raises(GroundingValueError, match="0 texts and 0 images"):
        RetrievalEvaluator([])(model)
    with pytest.raises(GroundingValueError, match="two pairs.*1 captions"):
        CaptionPairEvaluator(PAIRS[:1])(model)
