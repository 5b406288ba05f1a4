"""The examples run, and the README's code is code with names that exist."""

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest

import visual_ground
from tests.golden_parts import saved_parts

ROOT = Path(__file__).parent.parent


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # the datasets library's own
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_life_of_an_adapter(tmp_path, monkeypatch):
    lm, vision, _ = saved_parts(tmp_path)
    lines = ["file_name,caption"] + [f"{i}.png,the number {i}" for i in range(8)]
    (tmp_path / "metadata.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(sys, "argv", ["example", lm, vision, str(tmp_path)])
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    runpy.run_path(str(ROOT / "examples" / "life_of_an_adapter.py"))
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert "<img" in (tmp_path / "out" / "answer.html").read_text()


def test_the_readme_s_names_exist():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "visual_ground":
                assert all(hasattr(visual_ground, alias.name) for alias in node.names)
