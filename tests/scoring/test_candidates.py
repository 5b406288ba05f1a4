"""Candidates after one prompt: the numbers of reading each from scratch, for every family."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import FAMILIES, LLAMA, build, grounded, picture
from visual_ground.errors import GroundingValueError
from visual_ground.prompts.encoded import EncodedPrompt
from visual_ground.scoring.candidates import CandidateScorer

CANDIDATES = ["w9", "w20 w21 w22", "w5", "w30 w31 w32 w33 w34 w35 w36", "w20 w21", "w20 [RET]", "w9"]
SHARED = {family: family != "mamba" for family in FAMILIES}


def scorer_of(model, batch_size=3):
    return CandidateScorer(model.frozen_lm, model.active, batch_size)


def prompt_of(model, images=2):
    return model.processor.encode(["w5 w6", *[picture(i) for i in range(images)], "w7 w8"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("images", [0, 2])
def test_scores_are_those_of_reading_each_candidate_from_scratch(family, images):
    model = grounded(family)
    prompt = ["w5 w6", *[picture(i) for i in range(images)], "w7 w8"]
    expected = torch.cat([model.log_likelihood([prompt], [text]) for text in CANDIDATES])
    scorer = scorer_of(model)
    assert torch.allclose(scorer.score(prompt_of(model, images), CANDIDATES), expected, atol=1e-4)
    assert scorer.shares_prompt == SHARED[family]


def test_a_window_shorter_than_the_prompt_is_no_harm():
    settings = {**LLAMA, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    model = grounded(lm=build("gemma2_scaled_capped", **settings))
    prompt = ["w5 w6 w7 w8 w9", picture(0), "w7 w8 w9"]
    expected = torch.cat([model.log_likelihood([prompt], [text]) for text in CANDIDATES])
    scorer = scorer_of(model)
    assert torch.allclose(scorer.score(model.processor.encode(prompt), CANDIDATES), expected, atol=1e-4)
    assert scorer.shares_prompt


def test_features_stand_for_images():
    model = grounded()
    prompt = prompt_of(model)
    features = model.vision.encode([picture(0), picture(1)])
    without = EncodedPrompt(prompt.ids, ())
    found = scorer_of(model).score(without, CANDIDATES, features)
    assert torch.allclose(found, scorer_of(model).score(prompt, CANDIDATES), atol=1e-6)


MODEL = grounded("qwen2_tied")
words = st.lists(st.integers(4, 60), min_size=1, max_size=6).map(lambda ids: " ".join(f"w{i}" for i in ids))


@settings(max_examples=15)
@given(st.lists(words, min_size=1, max_size=8), st.randoms(use_true_random=False), st.integers(1, 5))
def test_neither_order_nor_batches_change_a_score(candidates, random, batch_size):
    scorer, order = scorer_of(MODEL, batch_size), list(range(len(candidates)))
    random.shuffle(order)
    found = scorer.score(prompt_of(MODEL, 1), candidates)
    shuffled = scorer_of(MODEL, 4).score(prompt_of(MODEL, 1), [candidates[number] for number in order])
    assert torch.allclose(shuffled, found[order], atol=1e-4)


def test_an_lm_that_cannot_go_on_after_a_prompt_is_read_from_scratch(monkeypatch):
    model = grounded()
    expected = scorer_of(model).score(prompt_of(model), CANDIDATES)
    real = CandidateScorer._after
    monkeypatch.setattr(CandidateScorer, "_after", lambda *arguments: real(*arguments) - 0.01)
    scorer = scorer_of(model)
    assert torch.allclose(scorer.score(prompt_of(model), CANDIDATES[1:]), expected[1:], atol=1e-4)
    assert scorer.shares_prompt is False


def test_candidates_without_tokens_are_named():
    model = grounded()
    with pytest.raises(GroundingValueError, match=r"at least one each; \[1\] have none"):
        scorer_of(model).score(prompt_of(model), ["w5", ""])
    with pytest.raises(GroundingValueError, match="all have none"):
        scorer_of(model).score(prompt_of(model), [])
    with pytest.raises(GroundingValueError, match="batch_size must be at least 1, got 0"):
        scorer_of(model, 0)
