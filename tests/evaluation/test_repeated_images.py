"""Pairs that repeat an image, as tables with five captions an image do: a perfect model finds all of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from tests.tiny import grounded, picture
from tests.training.runs import arguments
from visual_ground import GroundingTrainer
from visual_ground.evaluation.captions import draw_from_other_groups
from visual_ground.evaluation.metrics import recall_at, retrieval_recalls
from visual_ground.evaluation.pairs import Groups


def test_a_perfect_model_finds_everything_where_each_image_has_five_captions():
    images = normalize(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    groups = torch.arange(8).repeat_interleave(5)
    found = retrieval_recalls(images[groups], images[groups], groups)
    assert found == {way: {"r1": 100.0, "r5": 100.0, "r10": 100.0} for way in ("text_to_image", "image_to_text")}


def test_ties_with_another_image_count_against_the_query():
    vectors = torch.ones(6, 2)
    found = retrieval_recalls(vectors, vectors, torch.arange(3).repeat_interleave(2))
    assert found["text_to_image"]["r1"] == 0.0 and found["text_to_image"]["r5"] == 100.0


@settings(max_examples=50)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(0, 10_000))
def test_recalls_are_those_of_a_loop_over_queries_and_do_not_depend_on_the_order(groups, seed):
    draw = torch.Generator().manual_seed(seed)
    of_group = torch.randn(5, 4, generator=draw)
    texts, images = torch.randn(len(groups), 4, generator=draw), of_group[groups]
    found = retrieval_recalls(texts, images, torch.tensor(groups))
    hits = []
    for text, group in zip(texts, groups, strict=True):
        scores = {other: float(text @ of_group[other]) for other in set(groups)}
        hits.append(sum(scores[other] >= scores[group] for other in scores if other != group) < 1)
    assert found["text_to_image"]["r1"] == pytest.approx(100 * sum(hits) / len(hits))
    order = torch.randperm(len(groups), generator=draw)
    assert retrieval_recalls(texts[order], images[order], torch.tensor(groups)[order]) == found
    assert found["text_to_image"]["r1"] <= found["text_to_image"]["r5"] <= found["text_to_image"]["r10"]


def test_the_best_of_several_right_candidates_counts():
    right = torch.tensor([[True, False, True], [False, True, False]])
    assert recall_at(torch.tensor([[0.1, 0.5, 0.9], [0.9, 0.5, 0.1]]), (1, 2), right) == {"r1": 50.0, "r2": 100.0}


def test_pairs_are_about_one_image_by_their_group_or_by_what_they_show():
    groups = Groups()
    for pair in (
        {"image": picture(0), "group": 1},
        {"image": picture(1), "group": 2},
        {"image": picture(0), "group": 3},
        {"image": picture(2), "group": 2},
        {"image": picture(3), "group": 3},
    ):
        groups.add(pair)
    assert groups.numbers == [0, 1, 0, 1, 0]


@given(st.lists(st.integers(0, 4), min_size=2, max_size=12), st.integers(0, 1000))
@settings(max_examples=50)
def test_a_wrong_image_is_of_another_group_and_without_repeats_any_other_one(numbers, seed):
    groups = torch.tensor(numbers)
    if len(set(numbers)) > 1:
        others = draw_from_other_groups(groups, torch.Generator().manual_seed(seed))
        assert bool((groups[others] != groups).all())
    count = len(numbers)
    others = draw_from_other_groups(torch.arange(count), torch.Generator().manual_seed(seed))
    drawn = torch.randint(1, count, (count,), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(others, (torch.arange(count) + drawn) % count)


@pytest.mark.parametrize("form", [lambda i: picture(i), lambda i: np.asarray(picture(i)), lambda i: Path(f"{i}.png")])
def test_equal_images_are_one_in_whatever_form_they_come(form):
    groups = Groups()
    for i in (0, 1, 0, 1):
        groups.add({"image": form(i)})
    assert groups.numbers == [0, 1, 0, 1]


@pytest.mark.parametrize("cached", [True, False])
def test_each_caption_of_a_row_counts_and_an_image_that_is_repeated_is_one(cached, tmp_path, caplog):
    for i in range(4):
        picture(i).save(tmp_path / f"{i}.png")
        (tmp_path / f"copy{i}.png").write_bytes((tmp_path / f"{i}.png").read_bytes())
    (tmp_path / "broken.png").write_text("no image")
    texts = [[f"w{10 + i} w{20 + j}" for j in range(1 + i % 3)] for i in range(4)]
    listed = [{"image": f"{i}.png", "caption": [*texts[i], ""]} for i in range(4)]
    flat = [
        {"image": f"{'copy' * (j % 2)}{i}.png", "caption": text} for i in range(4) for j, text in enumerate(texts[i])
    ]
    model, found = grounded(), []
    options = dict(image_folder=str(tmp_path), cache_features=cached, max_skipped=0.5, eval_strategy="no")
    for name, rows in (("listed", listed), ("flat", flat)):
        rows = [*rows[:1], {"image": "broken.png", "caption": "w5"}, *rows[1:]]
        trainer = GroundingTrainer(model, arguments(tmp_path / name, **options), eval_dataset=rows)
        found.append(trainer.evaluate())
        assert "broken.png" in caplog.text and "Skipped 1 images" in caplog.text
        caplog.clear()
    assert {name: found[0][name] for name in found[0]} == pytest.approx(found[1])
    captions = sum(map(len, texts))
    assert len(trainer.eval_dataset) == captions and len(set(trainer.eval_dataset.groups)) == 4
