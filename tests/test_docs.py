"""The documentation's code runs, its commands have the options that they show, and its links lead somewhere.

The ```python blocks of a page run in order, in one namespace, in the folder that `tests.local_hub.documentation` makes.
`visual-ground` commands are parsed; those of the tutorial run as well, between its Python blocks. A block that cannot
run has a comment before it, `<!-- not run: REASON -->`; the last test counts those.
"""

import argparse
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.local_hub import documentation, hub, localise, write_open_clip_tower  # noqa: F401
from tests.paths import DOCS, ROOT
from visual_ground.cli.main import main

PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
RUN_COMMANDS = {"tutorial.md"}
NOT_RUN = 0
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>.*?) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```", re.S | re.M)
REPOSITORY = "https://github.com/visual-ground/visual_ground/blob/main/"
RAW = "https://raw.githubusercontent.com/visual-ground/visual_ground/main/"


@dataclass(frozen=True)
class Block:
    """A block of code of a page.

    Args:
        page: the file.
        line: the block's first line of code.
        language: "python", "bash" or another.
        code: the text.
        reason: why it is not run; None where it is.
    """

    page: Path
    line: int
    language: str
    code: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """The arguments of each `visual-ground` command of the block."""
        lines = self.code.replace("\\\n", " ").splitlines()
        found = (re.search(r"(?:^|-m )visual[-_]ground(?:\.cli\.main)? (.*)", line) for line in lines)
        return [shlex.split(match[1], comments=True) for match in found if match]


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    matches = BLOCK.finditer(text)
    return [
        Block(page, text.count("\n", 0, m.start("code")) + 1, m["language"], m["code"], m["reason"]) for m in matches
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PYTHON_PAGES = [page for page in PAGES if any(b.language == "python" and not b.reason for b in blocks_of(page))]


def run(page: Path, namespace: dict) -> None:
    """Run a page's blocks; a failure's traceback points into the page."""
    for block in blocks_of(page):
        if block.reason:
            continue
        if block.language == "python":
            code = "\n" * (block.line - 1) + localise(block.code)
            exec(compile(code, str(page), "exec"), namespace)
            check_printed(block, namespace)
        elif page.name in RUN_COMMANDS:
            for arguments in Block(page, block.line, "bash", localise(block.code), None).commands:
                assert main(arguments) == 0, (str(block), arguments)


def check_printed(block: Block, namespace: dict) -> None:
    """Compare what `print(...)  # value` says with the value, where it is a shape."""
    for expression, expected in re.findall(r"^print\((.*)\)  # (torch\.Size.*)$", block.code, re.M):
        assert str(eval(expression, namespace)) == expected, f"{block}: {expression}"


def answers_with_a_picture(model) -> None:
    answer = model.eval().generate([["cat.png", "What is it?"]], ret_bias=100.0, max_new_tokens=3)[0]
    assert answer.images


def check_language_models(names: dict) -> None:
    assert any("4bit" in type(module).__name__ for module in names["four_bit"].lm.modules())
    assert names["from_gguf"].active.provenance["base_model_name_or_path"].endswith(".gguf")
    assert any("lora_" in name for name, _ in names["with_lora"].lm.named_parameters())
    for name in ("four_bit", "from_gguf", "with_lora"):
        answers_with_a_picture(names[name])
    assert names["model"].adapters.active_name == "birds"


def check_vision(names: dict) -> None:
    model, tower = names["model"], names["the_tower"]
    assert model.active.provenance["vision_encoder"].startswith("open_clip:") and model.vision.feature_dim == 256
    pixels = model.vision.preprocess(["cat.png"])
    with torch.no_grad():
        assert torch.allclose(model.vision(pixels), tower.eval().encode_image(pixels), atol=1e-5)
    answers_with_a_picture(model)
    features = names["with_patches"].vision.encode(["cat.png"])
    assert names["with_patches"].adapter.image_tokens(features).shape[0] == 16


def check_generation(names: dict) -> None:
    assert names["answer"].images and "<img" in Path("answer.html").read_text()
    assert names["chat_answer"].parts


CHECKS = {"language_models.md": check_language_models, "vision.md": check_vision, "generation.md": check_generation}


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: page.name)
@pytest.mark.filterwarnings("ignore")  # Those of the libraries that load and train.
def test_the_python_of_a_page_runs(page, documentation):  # noqa: F811
    names = {"__name__": page.stem}
    if page.name == "vision.md":
        names["the_tower"] = write_open_clip_tower(documentation)
    run(page, names)
    CHECKS.get(page.name, lambda names: None)(names)


class Parsed(Exception):
    """A command line was understood."""


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.commands], ids=str)
def test_the_options_of_commands_exist(block, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def only_parse(self, *arguments, **options):
        parse(self, *arguments, **options)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    for arguments in block.commands:
        with pytest.raises(Parsed):
            main(arguments)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        for prefix in (REPOSITORY, RAW):
            if link.startswith(prefix):
                assert (ROOT / link.removeprefix(prefix).split("#")[0]).exists(), link
        if "://" not in link and not link.startswith("#"):
            assert page.name != "README.md", f"{link} is relative; the package index shows the README without its files"
            assert (page.parent / link.split("#")[0]).exists(), link


def test_few_blocks_are_not_run():
    left_out = [f"{block}: {block.reason}" for block in BLOCKS if block.reason]
    print(*left_out, sep="\n")
    assert len(left_out) == NOT_RUN, left_out
