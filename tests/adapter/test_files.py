"""A saved adapter is opened once, and folders of another format are refused with what to do."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.tiny import build, grounded, image_processor, tokenizer
from visual_ground import GroundedModel, GroundingConfig, ImageIndex
from visual_ground.adapter.anchors import ANCHORS_FILE, Anchors
from visual_ground.errors import GroundingValueError
from visual_ground.storage import tensors
from visual_ground.storage.tensors import CONFIG_FILE, WEIGHTS_FILE


def saved(folder):
    model = grounded("llama_untied")
    model.active.anchors = Anchors([["w9"], ["w5"]], torch.zeros(2, 12))
    model.save_pretrained(folder)
    return model


def load(folder, model):
    return GroundedModel.from_pretrained(build("llama_untied"), folder, model.vision, tokenizer(), image_processor)


def test_loading_reads_each_file_of_the_folder_once(tmp_path, monkeypatch):
    model, reads, opened = saved(tmp_path), Counter(), Counter()
    read_bytes, safe_open = Path.read_bytes, tensors.safe_open
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.update([path.name]) or read_bytes(path))
    monkeypatch.setattr(
        tensors, "safe_open", lambda path, **kw: opened.update([Path(path).name]) or safe_open(path, **kw)
    )
    monkeypatch.setattr(
        "visual_ground.adapter.anchors.safe_open",
        lambda path, **kw: opened.update([Path(path).name]) or safe_open(path, **kw),
    )
    load(tmp_path, model)
    assert reads == {CONFIG_FILE: 1}
    # The header before any model is loaded, the data after all was found to fit.
    assert opened == {WEIGHTS_FILE: 2, ANCHORS_FILE: 1}


def test_folders_of_format_version_1_are_refused_with_what_to_do(tmp_path):
    model = saved(tmp_path / "adapter")
    ImageIndex(torch.eye(2)).save_pretrained(tmp_path / "index")
    path = tmp_path / "adapter" / CONFIG_FILE
    values = json.loads(path.read_text())
    # As version 1 named things.
    old_names = {"image_projection": "image_to_rows", "text_retrieval_projection": "text_to_retrieval"}
    shapes = {name.replace(*pair): shape for pair in old_names.items() for name, shape in values["shapes"].items()}
    path.write_text(json.dumps({**values, "shapes": shapes, "format_version": 1, "config": {"units": "lm"}}))
    entries = tmp_path / "index" / "index.json"
    entries.write_text(json.dumps({**json.loads(entries.read_text()), "format_version": 1}))
    for read in (
        lambda: load(tmp_path / "adapter", model),
        lambda: GroundingConfig.from_pretrained(tmp_path / "adapter"),
        lambda: ImageIndex.from_pretrained(tmp_path / "index"),
    ):
        words = "format version 1; this visual_ground reads version [0-9]+. Install .* or make .* again"
        with pytest.raises(GroundingValueError, match=words):
            read()
