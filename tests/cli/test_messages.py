"""Every command: what cannot be done is one line on the standard error and exit code 2, Ctrl-C is 130."""

import logging
import os
import socket
import subprocess
import sys
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cli.calls import calls
from tests.golden_parts import saved_parts
from tests.tiny import grounded
from visual_ground.cli import main as cli
from visual_ground.cli.main import COMMANDS, main
from visual_ground.cli.shared import arguments
from visual_ground.cli.shared.messages import one_line
from visual_ground.errors import GroundingValueError


def replaced(monkeypatch, act):
    for command in COMMANDS:
        for name in [name for name in vars(command) if name == "run" or name.startswith("run_")]:
            monkeypatch.setattr(command, name, act)


@pytest.mark.parametrize("call", calls(), ids=lambda call: call[0])
def test_whatever_goes_wrong_is_one_line_and_the_exit_code_says_so(call, capsys, monkeypatch):
    for error, code, words in [
        (GroundingValueError("a\nb   c"), 2, "visual-ground: a b c\n"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (KeyError("name"), 2, "KeyError: 'name'"),
        (RuntimeError(), 2, "visual-ground: RuntimeError\n"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), 2, "UnicodeDecodeError"),
        (KeyboardInterrupt(), 130, ""),
    ]:

        def act(options, error=error):
            raise error

        replaced(monkeypatch, act)
        assert main(call) == code
        shown = capsys.readouterr()
        assert words in shown.err and shown.err.count("\n") == 1 and not shown.out


def test_a_traceback_is_there_for_those_who_ask(monkeypatch):
    def act(options):
        raise KeyError("name")

    replaced(monkeypatch, act)
    monkeypatch.setenv(cli.TRACEBACK, "1")
    with pytest.raises(KeyError):
        main(calls()[0])


@given(st.text(), st.sampled_from([GroundingValueError, OSError, RuntimeError, KeyError]))
def test_an_error_of_any_text_is_one_line_that_says_something(text, kind):
    line = one_line(kind(text))
    assert line and len(line.splitlines()) == 1


def test_other_packages_are_quiet_in_a_command_and_as_before_after_it(monkeypatch, capsys, caplog):
    seen = []

    def act(options):
        warnings.warn("advice", FutureWarning, stacklevel=1)
        logging.getLogger("transformers").warning("advice")
        logging.getLogger("visual_ground.index").warning("ours")
        seen.append(os.environ["TRANSFORMERS_VERBOSITY"])

    replaced(monkeypatch, act)
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    monkeypatch.setattr("sys.warnoptions", [])
    before = logging.getLogger("transformers").level
    assert main(calls()[0]) == 0
    assert [record.message for record in caplog.records] == ["ours"] and "advice" not in capsys.readouterr().err
    assert logging.getLogger("transformers").level == before and "TRANSFORMERS_VERBOSITY" not in os.environ
    assert seen == ["error"]
    with pytest.warns(FutureWarning):
        warnings.warn("advice", FutureWarning, stacklevel=1)


@pytest.mark.parametrize("value", ["-1", "-0.5", "-.5", "-1e3", "-1E-2"])
def test_negative_numbers_are_values(value, monkeypatch):
    seen = []
    replaced(monkeypatch, seen.append)
    for written in (["--ret-bias", value], [f"--ret-bias={value}"]):
        assert main(["chat", "lm", "adapter", *written]) == 0
    assert [options.ret_bias for options in seen] == [float(value)] * 2


@pytest.mark.parametrize(
    "call",
    [
        ["chat", "lm", "adapter", "--ret-bias", "-inf"],
        ["chat", "lm", "adapter", "--ret-bias", "nan"],
        ["chat", "lm", "adapter", "--max-images", "-1"],
        ["chat", "lm", "adapter", "--max-new-tokens", "0"],
        ["train", "lm", "vision", "data", "--steps", "-3"],
        ["train", "lm", "vision", "data", "--batch-size", "0"],
        ["train", "lm", "vision", "data", "--learning-rate", "-1"],
        ["train", "lm", "vision", "data", "--max-skipped", "1.5"],
        ["train", "lm", "vision", "data", "--seed", "one"],
        ["fit", "lm", "vision", "data", "--output", "out", "--visual-tokens", "0"],
        ["serve", "lm", "adapter", "--port", "65536"],
        ["serve", "lm", "adapter", "--timeout", "nan"],
        ["serve", "lm", "adapter", "--max-batch", "0"],
        ["app", "lm", "adapter", "--port", "-1"],
    ],
    ids=lambda call: " ".join(call[3:]),
)
def test_numbers_out_of_range_are_refused_before_anything_is_loaded(call, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(call)
    assert stopped.value.code == 2 and "must be" in capsys.readouterr().err


def test_options_that_are_not_given_leave_the_library_s_defaults():
    parser = arguments.argparse.ArgumentParser()
    arguments.add_answer_options(parser)
    assert arguments.answer_options(parser.parse_args([])) == {}
    given_options = parser.parse_args(["--max-images", "2", "--max-new-tokens", "9", "--ret-bias", "0"])
    assert arguments.answer_options(given_options) == {"max_new_tokens": 9, "max_images": 2, "ret_bias": 0.0}


def test_a_folder_that_is_missing_is_called_a_folder(tmp_path, capsys):
    lm, vision, table = saved_parts(tmp_path)
    grounded().save_pretrained(tmp_path / "adapter")
    capsys.readouterr()  # torch's own words on what is imported first
    missing, adapter = str(tmp_path / "no such folder" / "lm"), str(tmp_path / "adapter")
    for call in (
        ["chat", missing, adapter, "--once", "hello"],
        ["index", "build", missing, adapter, str(tmp_path), "--output", str(tmp_path / "out")],
        ["chat", lm, adapter, "--vision", missing, "--once", "hello"],
        ["chat", lm, missing, "--once", "hello"],
        ["train", lm, missing, table, "--output", str(tmp_path / "out"), "--steps", "1"],
    ):
        assert main(call) == 2
        error = capsys.readouterr().err
        last = error.splitlines()[-1]  # Before it come bars of progress.
        assert last.startswith("visual-ground: ") and "folder" in last and repr(missing) in last, error
        assert "alphanumeric" not in error and "Traceback" not in error


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "no such host"])
def test_an_address_that_is_taken_is_one_line_before_anything_is_loaded(address, capsys):
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as taken:
        try:
            taken.bind(("::1" if ":" in address else "127.0.0.1", 0))
        except OSError:
            pytest.skip("this machine has no such address")
        taken.listen()
        assert main(["serve", "no lm", "no adapter", "--address", address, "--port", str(taken.getsockname()[1])]) == 2
    error = capsys.readouterr().err
    assert "Nothing can listen at" in error and error.count("\n") == 1


def test_a_reader_that_has_gone_is_no_error(tmp_path):
    code = "import sys; from visual_ground.cli import main as m; m.COMMANDS[0].run = lambda options: print('x' * 10**6)"
    call = [sys.executable, "-c", f"{code}; sys.exit(m.main({calls()[0]!r}))"]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.read(1)
        process.stdout.close()
        error = process.stderr.read()
    assert (process.returncode, error) == (0, "")
