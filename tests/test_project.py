"""What the project says of itself in several places agrees."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import visual_ground
from visual_ground.adapter.adapter import Adapter
from visual_ground.cli.main import main

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()


def test_the_command_tells_the_installed_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out == f"visual-ground {version('visual-ground')}\n"


def test_the_package_is_a_command():
    shown = subprocess.run([sys.executable, "-m", "visual_ground", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 0 and shown.stdout.startswith("usage: visual-ground"), shown.stderr


def test_types_are_published():
    assert (Path(visual_ground.__file__).parent / "py.typed").exists()


def test_one_address():
    (address,) = re.findall(r'^Repository = "(.*)"$', PROJECT, re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["repository-code"] == citation["url"] == address
    assert f"repo_url: {address}\n" in (ROOT / "mkdocs.yml").read_text()
    assert f"{address}/security/advisories/new" in (ROOT / "SECURITY.md").read_text()


def test_the_readme_counts_the_parameters_of_an_adapter():
    # The widths of Qwen2.5-0.5B and of CLIP ViT-B/32, whose own parameters are the rest.
    adapter = Adapter(visual_ground.GroundingConfig(), 896, 512, (896,), 896, tied=False)
    count = sum(parameter.numel() for parameter in adapter.parameters())
    total = count + 494_032_768 + 151_277_313
    shown = f"trainable params: {count:,d} || all params: {total:,d} || trainable%: {100 * count / total:.4f}"
    assert shown in (ROOT / "README.md").read_text()


def test_ci_runs_every_python_that_the_package_names():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    tested = workflow["jobs"]["quick"]["strategy"]["matrix"]["python"]
    assert tested == re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)


def test_pre_commit_runs_what_ci_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    gate = (ROOT / ".ci" / "run").read_text()
    for hook in hooks:
        command, target = hook["entry"].split()
        assert command == "make" and f"make VENV=.ci/venv {target}\n" in gate
