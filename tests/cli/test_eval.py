"""`visual-ground eval` on one of the field's tasks."""

import json

import pytest

from tests.evaluation.nearness import write_images
from tests.tiny import grounded
from visual_ground.adapter.files import AdapterFiles
from visual_ground.cli.main import main


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The command up to its options, for a saved adapter and two images in Karpathy's format."""
    monkeypatch.chdir(tmp_path)
    grounded().save_pretrained("adapter")
    monkeypatch.setattr("visual_ground.cli.commands.eval.load_model", lambda options: grounded())
    write_images(tmp_path / "data", ["a.png", "b.png"])
    entry = {"split": "test", "sentences": [{"raw": "w5 w6"}]}
    images = [{**entry, "filename": name} for name in ("a.png", "b.png")]
    (tmp_path / "data" / "dataset_coco.json").write_text(json.dumps({"dataset": "coco", "images": images}))
    return ["eval", "lm", "adapter", "karpathy"]


def test_a_task_is_reported_saved_and_recorded(command, tmp_path, capsys):
    options = [
        "--data",
        "data",
        "--set",
        "fold_size=0",
        "--seed",
        "5",
        "--output",
        "out/report.json",
        "--record",
        "--device",
        "cpu",
    ]
    assert main([*command, *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["metrics"]["text_to_image_r5"] == 100 and report["settings"]["seed"] == 5
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    recorded = AdapterFiles.open(tmp_path / "adapter").metadata.report.evaluations
    assert [(one.dataset, one.split, one.pairs) for one in recorded] == [("COCO (Karpathy)", "test", 2)]
    assert recorded[0].metrics == report["metrics"]
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert (
        "model-index" in card and "| COCO (Karpathy) | test | 2 | Recall at 5, text to image (percent) | 100 |" in card
    )
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "evaluations").iterdir()) == ["features", "karpathy"]


def test_what_cannot_be_measured_is_one_line(command, capsys):
    for options, words in [
        ([], "needs data="),
        (["--data", "none"], "is no folder"),
        (["--data", "data", "--set", "split"], "--set takes NAME=VALUE"),
        (["--data", "data", "--set", "colour=red"], "has no settings ['colour']"),
    ]:
        assert main([*command, *options]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert main([*command[:3], "karpaty", "--data", "data"]) == 2
    assert "no task 'karpaty'; there are" in capsys.readouterr().err
    assert main([*command[:3], "pairs.csv", "--record"]) == 2
    assert "--record me/pairs" in capsys.readouterr().err


def test_pairs_that_cannot_be_read_are_named_and_every_caption_counts(command, tmp_path, capsys, caplog):
    rows = [
        {"image": "data/a.png", "caption": ["w5 w6", "w7"]},
        {"image": "data/none.png", "caption": ["w5"]},
        {"image": "data/b.png", "caption": [""]},
        {"image": "data/b.png", "caption": ["w8 w9", None]},
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main([*command[:3], "pairs.jsonl"]) == 2
    assert "max_skipped" in capsys.readouterr().err
    assert main([*command[:3], "pairs.jsonl", "--max-skipped", "0.5"]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"] == 3
    assert "row 1" in caplog.text and "none.png" in caplog.text and "row 2: its caption is empty" in caplog.text
    assert main([*command[:3], "none.jsonl"]) == 2
