import json

import pytest

from tests.golden_parts import saved_parts
from visual_ground.cli import main


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files that datasets leaves open
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_train_index_chat_eval(tmp_path, capsys):
    lm, vision, table = saved_parts(tmp_path)
    out = str(tmp_path / "adapter")
    assert main(["train", lm, vision, table, "--output", out, "--steps", "2", "--batch-size", "4"]) == 0
    assert main(["index", lm, out, str(tmp_path), "--output", str(tmp_path / "index")]) == 0
    capsys.readouterr()
    options = ["--index", str(tmp_path / "index"), "--ret-bias", "100", "--max-new-tokens", "2"]
    page = tmp_path / "page.html"
    prompt = f"look {tmp_path / '0.png'} please"
    assert main(["chat", lm, out, *options, "--once", prompt, "--html", str(page)]) == 0
    assert ".png]" in capsys.readouterr().out and "<img" in page.read_text()
    assert main(["eval", lm, out, table]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"] == 8


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_bad_input_is_said(tmp_path, capsys):
    lm, vision, table = saved_parts(tmp_path)
    for arguments, words in [
        (["train", lm, vision, table, "--output", str(tmp_path), "--caption-column", "text"], "['text']"),
        (["train", lm, vision, str(tmp_path / "none.csv"), "--output", str(tmp_path)], "cannot be loaded"),
        (["index", lm, str(tmp_path / "none"), table, "--output", str(tmp_path)], "none"),
    ]:
        assert main(arguments) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "index", "chat", "eval", "push", "import-fromage", "transfer", "demo"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0 and command in capsys.readouterr().out
