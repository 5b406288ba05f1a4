import argparse
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.golden_parts import saved_parts
from tests.paths import ROOT
from tests.storage.hub_client import hub  # noqa: F401
from tests.tiny import grounded, picture
from visual_ground import ImageIndex
from visual_ground.cli.arguments import ground_models
from visual_ground.cli.main import COMMANDS, main
from visual_ground.lm.base import loading
from visual_ground.storage.tensors import WEIGHTS_FILE


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files that datasets leaves open
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_train_index_chat_eval(tmp_path, capsys):
    lm, vision, table = saved_parts(tmp_path)
    out = str(tmp_path / "adapter")
    assert main(["train", lm, vision, table, "--output", out, "--steps", "2", "--batch-size", "4"]) == 0
    said = capsys.readouterr().err  # It is no terminal: each stage says in lines of its own what it does.
    for stage in ("features", "start values: images", "start values: texts", "start values: image tokens"):
        assert re.search(rf"^{stage}: 0 of \d+ \w+ starts$", said, re.MULTILINE), said
    assert main(["index", "build", lm, out, str(tmp_path), "--output", str(tmp_path / "index")]) == 0
    assert "8 images in" in capsys.readouterr().out
    fitted = str(tmp_path / "fitted")
    assert main(["fit", lm, vision, table, "--output", fitted]) == 0
    assert "\nfit: captions and requests: 0 of" in capsys.readouterr().err
    assert main(["chat", lm, fitted, "--once", "look", "--max-new-tokens", "2"]) == 0
    capsys.readouterr()
    options = [
        "--index",
        str(tmp_path / "index"),
        "--images",
        str(tmp_path),
        "--ret-bias",
        "100",
        "--max-new-tokens",
        "2",
    ]
    page = tmp_path / "page.html"
    prompt = f"look {tmp_path / '0.png'} please"
    assert main(["chat", lm, out, *options, "--once", prompt, "--html", str(page)]) == 0
    assert ".png]" in capsys.readouterr().out and "<img" in page.read_text()
    assert main(["eval", lm, out, table, "--record", "some/pairs", "--dataset-revision", "abc"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["pairs"] == 8 and 0 <= results["text_to_image_r1"] <= results["text_to_image_r5"] <= 100
    assert 0 <= results["image_to_text_r1"] <= 100 and 0 <= results["caption_pair_accuracy"] <= 100
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "dataset_revision" not in card and "revision: abc" in card and "| some/pairs at `abc` | train | 8 |" in card


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("asked", [None, True, False])
@pytest.mark.parametrize("command", ["train", "fit"])
def test_an_lm_is_read_in_bfloat16_where_fast_or_asked_for(command, asked, native, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loading, "multiplies_bfloat16", lambda device: native)
    lm, vision, table = saved_parts(tmp_path)
    parser = argparse.ArgumentParser()
    next(one for one in COMMANDS if one.__name__.endswith(f".{command}")).add_parser(parser.add_subparsers())
    options = {None: [], True: ["--bf16"], False: ["--no-bf16"]}[asked]
    model = ground_models(parser.parse_args([command, lm, vision, table, "--output", str(tmp_path), *options]))
    in_bfloat16 = native if asked is None else asked
    assert model.lm.dtype == (torch.bfloat16 if in_bfloat16 else torch.float32)
    assert all(parameter.dtype == torch.float32 for parameter in model.adapter.parameters())
    # What nobody asked for is said.
    assert ("--no-bf16" in capsys.readouterr().err) == (asked is None and native)


@pytest.mark.parametrize("command", ["train", "fit"])
def test_a_missing_lm_is_named_whatever_it_is_to_be_read_in(command, tmp_path, capsys):
    _, vision, table = saved_parts(tmp_path)
    for options in (["--bf16"], ["--no-bf16"]):
        missing = str(tmp_path / "no lm")
        assert main([command, missing, vision, table, "--output", str(tmp_path / "out"), *options]) == 2
        assert f"There is no folder {missing!r}" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_bad_input_is_said(tmp_path, capsys):
    lm, vision, table = saved_parts(tmp_path)
    for arguments, words in [
        (["train", lm, vision, table, "--output", str(tmp_path), "--caption-column", "text"], "['text']"),
        (["train", lm, vision, str(tmp_path / "none.csv"), "--output", str(tmp_path)], "cannot be loaded"),
        (["index", "build", lm, str(tmp_path / "none"), table, "--output", str(tmp_path)], "none"),
    ]:
        assert main(arguments) == 2
        assert words in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_push(hub, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HF_TOKEN", "writer")
    grounded("llama_untied").save_pretrained(tmp_path / "adapter")
    page = tmp_path / "adapter" / "README.md"
    page.write_text(page.read_text().replace("## Limits", "## From me\n\nMind the step.\n\n## Limits"))
    picture(0).save(tmp_path / "0.png")
    ImageIndex(torch.eye(2), images=[picture(1), str(tmp_path / "0.png")]).save_pretrained(tmp_path / "index")
    assert main(["push", str(tmp_path / "adapter"), "me/adapter", "--private", "--message", "hello"]) == 0
    assert capsys.readouterr().out.startswith(hub.url)
    assert hub.repos["models", "me/adapter"].private and hub.repos["models", "me/adapter"].messages[-1] == "hello"
    assert b"Mind the step." in hub.files("me/adapter")["README.md"]
    assert hub.files("me/adapter")[WEIGHTS_FILE] == (tmp_path / "adapter" / WEIGHTS_FILE).read_bytes()
    assert main(["push", str(tmp_path / "index"), "me/index", "--copy-images"]) == 0
    assert sorted(name for name in hub.files("me/index", kind="datasets") if "images/" in name) == [
        "images/00000000.png",
        "images/00000001.png",
    ]
    for folder in (tmp_path / "none", tmp_path):
        assert main(["push", str(folder), "me/adapter"]) == 2


def test_an_index_is_changed_from_the_command_line(tmp_path, capsys):
    folder, table = str(tmp_path / "index"), str(tmp_path / "table.npy")
    np.save(table, np.eye(4, dtype=np.float32))
    index = ImageIndex(torch.eye(4), ["a", "b", "3", 4], metadata=[{"n": i} for i in range(4)])
    index.save_pretrained(folder)
    for arguments, words in (
        (["remove", folder, "a", "4"], "2 entries removed, 2 left"),
        (["info", folder], '"entries": 2'),
        (["remove", folder, "--filter", '{"n": {"ge": 2}}'], "1 entries removed, 1 left"),
        (["convert", table, "--output", str(tmp_path / "converted")], "4 entries of width 4"),
        (["convert", table, "--output", str(tmp_path / "images.db")], "4 entries of width 4"),
        (["convert", folder, "--output", str(tmp_path / "images.db#more")], "1 entries of width 4"),
        (["info", str(tmp_path / "images.db#more")], '"entries": 1'),
    ):
        assert main(["index", *arguments]) == 0
        assert words in capsys.readouterr().out
    assert ImageIndex.from_pretrained(folder).ids == ["b"]
    for arguments in (
        ["convert", folder, "--output", table],
        ["remove", folder, "gone"],
        ["remove", folder],
        ["remove", folder, "--filter", "{n}"],
    ):
        assert main(["index", *arguments]) == 2
    assert ImageIndex.from_pretrained(folder).ids == ["b"]


@pytest.mark.parametrize(
    "command", ["fit", "train", "index", "chat", "serve", "app", "eval", "push", "import-fromage", "transfer", "demo"]
)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0 and command in capsys.readouterr().out


def test_help_lists_all_commands_and_loads_no_torch():
    code = (
        "import sys\nfrom visual_ground.cli.main import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit:\n    print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    listed = re.findall(r"^    ([a-z-]+)(?:  |$)", shown, re.MULTILINE)
    assert (
        listed == [command.__name__.rsplit(".", 1)[1].replace("_", "-") for command in COMMANDS] and len(listed) == 11
    )
    assert shown.endswith("False False\n")
