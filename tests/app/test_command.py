"""`visual-ground app`: what it loads, and what it says where something is missing."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from tests.tiny import grounded, picture
from visual_ground import ImageIndex
from visual_ground.cli.commands import app
from visual_ground.cli.main import main
from visual_ground.demo import saved
from visual_ground.demo.emoji import Concept
from visual_ground.index.milvus.image_index import MilvusImageIndex


def test_without_gradio_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app", "lm", "adapter"]) == 2
    assert 'pip install "visual-ground[app]"' in capsys.readouterr().err


def test_before_the_demo_has_run_it_says_what_to_do(tmp_path, capsys):
    with pytest.raises(Exception, match="make demo"):
        saved.load_demo(tmp_path, tmp_path)


def test_what_the_demo_saves_is_loaded_with_pictures_and_credits(tmp_path, monkeypatch):
    pictures = tmp_path / "cache" / "emoji"
    pictures.mkdir(parents=True)
    picture(0).save(pictures / "fox.png")
    model = grounded()
    index = ImageIndex.build(model, [str(pictures / "fox.png")], ["fox"])
    recalls = {"text_to_image": {"r1": 12.5}, "image_to_text": {"r1": 25.0}}
    results = {"seen": recalls, "unseen": {**recalls, "text_to_image": {"r1": 6.25}}, "caption_pair_accuracy": 80.0}
    saved.record_results(model, results, 150, "test")
    saved.save_demo(model, index, [Concept("1f98a", "fox", (), "train", "animal")], tmp_path)
    monkeypatch.setattr(saved, "load_lm", lambda cache: (grounded().unground(), model.tokenizer))
    monkeypatch.setattr(saved, "load_vision", lambda cache: model.vision)
    _, loaded = saved.load_demo(tmp_path, tmp_path / "cache")
    name, image, metadata = loaded.entry(0)
    card = (tmp_path / "adapter" / "README.md").read_text()
    for line in (
        "concepts seen in training | train | 300 | Recall at 1, text to image (percent) | 12.5 |",
        "unseen concepts | test | 300 | Recall at 1, text to image (percent) | 6.25 |",
        "unseen concepts | test | 300 | Caption pair accuracy (percent) | 80 |",
    ):
        assert line in card
    assert name == "fox" and Path(image).read_bytes() == (pictures / "fox.png").read_bytes()
    assert metadata["credit"] and metadata["licence"] and metadata["source"].endswith("1F98A/")


def test_several_indexes_and_adapters_by_name(tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="make test-app installs the extra `app-tests`")
    model = grounded()
    model.save_pretrained(tmp_path / "birds")
    for name in ("photos", "more"):
        ImageIndex.build(model, [picture(0)]).save_pretrained(tmp_path / name)
    MilvusImageIndex.create(tmp_path / "images.db", model.config.retrieval_dim).add(torch.eye(6)[:1], ["a"])
    monkeypatch.setattr(app, "load_model", lambda options: model)
    options = dict(lm="lm", adapter="a", another_adapter=[f"birds={tmp_path / 'birds'}"], title="T", system="S")
    indexes = [f"mine={tmp_path / 'photos'}", str(tmp_path / "more"), f"stored={tmp_path / 'images.db'}"]
    given = Namespace(**options, max_images=2, index=indexes, images=[], host=[], example=["Hi?"], demo=tmp_path)
    loaded, albums, settings = app.load(given)
    assert list(albums) == ["mine", "more", "stored"] and list(loaded.adapters) == ["default", "birds"]
    assert isinstance(albums["stored"], MilvusImageIndex)
    assert (settings.title, settings.system, tuple(settings.examples)) == ("T", "S", ("Hi?",))
    assert settings.max_images == 2
