"""Pictures in terminals: drawn where the terminal is known to, a plain line elsewhere."""

import base64
import io
import re
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.tiny import picture
from visual_ground import RetrievedImage
from visual_ground.cli.commands import chat
from visual_ground.terminal.inline import PROTOCOLS, SETTING, drawn, protocol_of, sixel


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, None),
        ({"TERM": "xterm-256color"}, None),
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"LC_TERMINAL": "iTerm2"}, "iterm2"),
        ({"TERM": "foot-extra"}, "sixel"),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/x"}, None),
        ({"TERM": "xterm-kitty", SETTING: "none"}, None),
        ({"TERM": "xterm", SETTING: "sixel"}, "sixel"),
    ],
)
def test_terminals_are_known_by_their_variables_and_files_are_none(environment, expected):
    assert protocol_of(Terminal(), environment) == expected
    assert protocol_of(io.StringIO(), environment) is None


def decoded_sixels(text):
    """Return the picture (h, w, 3) in percent that sixels draw."""
    body = re.fullmatch(r'\x1bP0;1q"1;1;(\d+);(\d+)(.*)\x1b\\', text, re.S)
    width, height = int(body[1]), int(body[2])
    canvas, colors = np.full((height + 6, width, 3), -1), {}
    x = y = color = 0
    for token in re.findall(r"#\d+;2;\d+;\d+;\d+|#\d+|!\d+[?-~]|[?-~]|[$-]", body[3]):
        if token.startswith("#"):
            number, *levels = map(int, token[1:].split(";"))
            color = number
            if levels:
                colors[number] = levels[1:]
        elif token == "$":
            x = 0
        elif token == "-":
            x, y = 0, y + 6
        else:
            count = int(token[1:-1]) if token.startswith("!") else 1
            for _ in range(count):
                for bit in range(6):
                    if (ord(token[-1]) - 63) >> bit & 1:
                        canvas[y + bit, x] = colors[color]
                x += 1
    assert (canvas[height:] == -1).all(), "nothing is drawn below the picture"
    return canvas[:height]


@settings(max_examples=30)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_sixels_are_the_picture(width, height, seed):
    # Few enough colors that none has to be left out.
    pixels = np.random.default_rng(seed).integers(0, 3, (height, width, 3), dtype=np.uint8) * 127
    shown = decoded_sixels(sixel(Image.fromarray(pixels)))
    assert np.abs(shown - pixels.astype(float) / 2.55).max() <= 1


def test_kitty_and_iterm2_get_the_file_in_pieces():
    large = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8))
    kitty = drawn(large, "kitty")
    pieces = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", kitty)
    assert "".join(f"\x1b_G{head};{data}\x1b\\" for head, data in pieces) == kitty and len(pieces) > 1
    assert pieces[0][0].startswith("a=T,f=100") and [head[-3:] for head, _ in pieces] == ["m=1"] * (len(pieces) - 1) + [
        "m=0"
    ]
    assert all(len(data) <= 4096 for _, data in pieces)
    (data,) = re.fullmatch(
        r"\x1b\]1337;File=inline=1;size=\d+;width=300px;height=200px:(.*)\x07", drawn(large, "iterm2")
    ).groups()
    for file in ("".join(data for _, data in pieces), data):
        with Image.open(io.BytesIO(base64.b64decode(file))) as opened:
            assert opened.size == (300, 200)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_answer_shows_its_pictures_and_goes_on_where_one_is_gone(protocol, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv(SETTING, protocol)
    here, gone = RetrievedImage("here", 0.5, picture(0)), RetrievedImage("gone", 0.4, str(tmp_path / "gone.png"))
    shown, line = chat.shown(here, True), chat.shown(gone, True)
    assert "\x1b" in shown and shown.endswith("[image here] 0.50\n")
    assert "\x1b" not in line and line.startswith("[image gone] 0.40")
    monkeypatch.setenv(SETTING, "none")
    assert chat.shown(here, True) == "[image here] 0.50\n"
