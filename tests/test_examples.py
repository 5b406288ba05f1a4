"""The scripts in examples/ run."""

import runpy
import shutil
import sys

import pytest

from tests.golden_parts import saved_parts
from tests.paths import ROOT


def datasets_warnings(test):
    """Let a test use the datasets library, which leaves files open."""
    for allowed in ("ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"):
        test = pytest.mark.filterwarnings(allowed)(test)
    return test


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs an example over a folder of eight captioned images."""
    lines = ["file_name,caption"] + [f"{i}.png,the number {i}" for i in range(8)]
    (tmp_path / "metadata.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / "examples" / name))

    return run


@datasets_warnings
def test_life_of_an_adapter(tmp_path, run):
    lm, vision, _ = saved_parts(tmp_path)
    run("life_of_an_adapter.py", lm, vision, tmp_path)
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert "<img" in (tmp_path / "out" / "answer.html").read_text()


@datasets_warnings
def test_its_steps_one_by_one(tmp_path, run, capsys):
    lm, vision, _ = saved_parts(tmp_path)
    folder, adapter, page = tmp_path / "images", tmp_path / "adapter", tmp_path / "page.html"
    folder.mkdir()
    for file in [*tmp_path.glob("*.png"), tmp_path / "metadata.csv"]:
        shutil.copy(file, folder)
    run("train.py", lm, vision, folder, adapter)
    run("evaluate.py", lm, adapter, folder)
    run("converse.py", lm, adapter, folder, page)
    assert "text_to_image" in capsys.readouterr().out
    assert "<img" in page.read_text()
