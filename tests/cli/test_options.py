"""Every option of every command: what cannot be its value is one line and exit code 2, before anything is loaded."""

import argparse

import pytest

from tests.cli.calls import calls
from visual_ground.cli.main import COMMANDS, Parser, main
from visual_ground.cli.shared.arguments import number, place, whole

# Types of argparse that say what they take; a bare `int` would not, and takes numbers that mean nothing.
CHECKED = {one.__qualname__ for one in (number(), whole(0), place)} | {"Path"}
NONSENSE = {
    "number": ["nan", "inf", "-inf", "", "x", "²"],
    "whole": ["-1", "1.5", "nan", "", "x", "²"],
    "place": ["", " "],
}


def options_of(parser, words=()):
    """Yield each option of a parser and of those below it, with the words that lead to it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from options_of(below, (*words, name))
        elif action.option_strings and action.type is not None:
            yield words, action.option_strings[0], action.type.__qualname__


def all_options():
    parser = Parser()
    commands = parser.add_subparsers()
    for command in COMMANDS:
        command.add_parser(commands)
    return list(options_of(parser))


@pytest.mark.parametrize("words, option, kind", all_options(), ids=lambda value: str(value))
def test_every_option_says_what_it_takes_and_refuses_the_rest_in_one_line(words, option, kind, capsys):
    assert kind in CHECKED
    for value in NONSENSE.get(kind.partition(".")[0], ()):
        with pytest.raises(SystemExit) as stopped:
            main([*words, f"{option}={value}"])
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.count("\n") == 1 and option in said and "--help" in said


@pytest.mark.parametrize("words", [[], ["nothing"], *([call[0], "--nothing"] for call in calls())], ids=" ".join)
def test_words_that_no_command_knows_are_one_line(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


WRITING = {
    ("fit", "lm", "vision", "data"): ("--output", "folder"),
    ("train", "lm", "vision", "data"): ("--output", "folder"),
    ("transfer", "adapter", "lm"): ("--output", "folder"),
    ("import-fromage", "folder"): ("--output", "folder"),
    ("index", "build", "lm", "adapter", "images"): ("--output", "folder"),
    ("eval", "lm", "adapter", "data"): ("--output", "file"),
    ("chat", "lm", "adapter"): ("--html", "file"),
}


@pytest.mark.parametrize("call, option", WRITING.items(), ids=lambda value: value[0])
def test_a_place_that_cannot_be_written_is_one_line_before_anything_is_loaded(call, option, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    wrong = tmp_path if option[1] == "file" else tmp_path / "file"
    assert main([*call, option[0], str(wrong)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and repr(str(wrong)) in said and f"The output is a {option[1]}" in said
    assert (tmp_path / "file").read_text() == "mine"
