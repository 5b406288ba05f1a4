"""The terminal's conversation: pictures stay in it, lines are read as written, and it ends as a program should."""

import io
import json
import sys

import pytest

from tests.tiny import grounded, picture
from visual_ground import GroundingError, ImageIndex
from visual_ground.cli.commands import chat
from visual_ground.cli.main import main
from visual_ground.terminal.conversation import Conversation, split_line

TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"
OPTIONS = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, ret_bias=1e3, max_images=1)


@pytest.fixture
def conversation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(0).save(tmp_path / "my cat.png")
    picture(1).save(tmp_path / "dog.png")
    model = grounded()
    model.tokenizer.chat_template = TEMPLATE
    index = ImageIndex.build(model, ["dog.png", "my cat.png"])
    return Conversation(model, index, OPTIONS)


def talk(conversation, text, monkeypatch, capsys, page=None):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    code = chat.converse(conversation, page)
    return (code, *capsys.readouterr())


def test_lines_are_cut_at_pictures_and_nowhere_else(conversation):
    assert split_line("see 'my cat.png', and dog.png  don't \"go\"") == [
        "see",
        "my cat.png",
        ", and",
        "dog.png",
        'don\'t "go"',
    ]
    assert split_line(r"my\ cat.png a\b none.png") == ["my cat.png", r"a\b none.png"]


def test_pictures_of_both_sides_stay_in_the_conversation(conversation):
    list(conversation.answer("w4 dog.png"))
    list(conversation.answer("w5"))
    images = [p for m in conversation._messages for p in m["content"] if p["type"] == "image"]
    assert len(images) == 3 and [m["role"] for m in conversation._messages] == ["user", "assistant"] * 2
    seen = conversation.model.processor.encode([*conversation._messages, {"role": "user", "content": "w6"}])
    assert len(seen.images) == 3


def test_commands(conversation, monkeypatch, capsys, tmp_path):
    lines = "/help\n/image my cat.png\nw4\n/save a.json\n/save a.md\n/save a.html\n/save a.xyz\n/what\n/image x\n"
    code, out, err = talk(conversation, lines + "/reset\n/save b.md\n", monkeypatch, capsys)
    assert code == 2 and "[image " in out and "/what is no command" in err and "'x' is not an image" in err
    turns = json.loads((tmp_path / "a.json").read_text())
    assert [part["type"] for part in turns[0]["parts"]] == ["image", "text"] and turns[1]["role"] == "assistant"
    assert "my%20cat.png" in (tmp_path / "a.md").read_text() and "<img" in (tmp_path / "a.html").read_text()
    assert "nothing to save" in err and not (tmp_path / "b.md").exists() and "a.xyz" in err


def test_in_a_pipe_there_are_only_answers(conversation, monkeypatch, capsys, tmp_path):
    code, out, err = talk(conversation, "w4\n\nw5\n", monkeypatch, capsys, str(tmp_path / "page.html"))
    assert code == 0 and not err and ">" not in out and out.count("[image ") == 2
    assert "<img" in (tmp_path / "page.html").read_text()


def test_ctrl_c_keeps_what_was_said(conversation, monkeypatch, capsys):
    stream = conversation.model.stream

    def interrupted(*args, **options):
        yield next(iter(stream(*args, **options)))
        raise KeyboardInterrupt

    monkeypatch.setattr(conversation.model, "stream", interrupted)
    chat.answer(conversation, "w4", None)
    assert "[stopped]" in capsys.readouterr().out and len(conversation.turns) == 2


def test_a_line_that_fails_is_forgotten(conversation, monkeypatch, capsys):
    code, out, err = talk(conversation, "w4 " * 9999 + "\nw5\n", monkeypatch, capsys)
    assert (code == 2 and "context" in err) or code == 0
    conversation.reset()
    conversation.options["images_per_ret"] = 0
    with pytest.raises(GroundingError):
        list(conversation.answer("w4"))
    assert not conversation.turns


def test_without_a_template_each_line_stands_alone(conversation):
    conversation.model.tokenizer.chat_template = None
    assert list(conversation.answer("w4")) and list(conversation.answer("w5"))


def test_a_folder_as_the_page_is_said_before_anything_is_loaded(tmp_path, capsys):
    assert main(["chat", "no/lm", "no/adapter", "--once", "w4", "--html", str(tmp_path)]) == 2
    assert "is a folder" in (said := capsys.readouterr().err) and said.count("\n") == 1
