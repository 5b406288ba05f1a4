"""Pictures between the lines of a terminal, by the protocols that terminals have for them."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Mapping
from typing import Any, TextIO

import numpy as np
from PIL import Image

from visual_ground.errors import GroundingError
from visual_ground.vision.decoding import to_png
from visual_ground.vision.images import to_rgb

# Names the protocol where it cannot be told from the terminal's own variables.
SETTING = "VISUAL_GROUND_IMAGES"
PROTOCOLS = ("kitty", "iterm2", "sixel")
SIDE = 320  # Pixels of the longer side; about a quarter of a window.
CHUNK = 4096  # The most base64 in one escape of kitty's protocol.
COLORS = 255  # Of a sixel picture; terminals have registers for 256.
BAND = 6  # Rows that one line of sixels holds.


def protocol_of(stream: TextIO, environment: Mapping[str, str]) -> str | None:
    """Return how a terminal takes pictures, or None where it takes none or that is not known.

    Args:
        stream: where the pictures are to go; files and pipes take none.
        environment: its variables; `VISUAL_GROUND_IMAGES` may be one of `PROTOCOLS`, or anything else for none.
    """
    if not stream.isatty():
        return None
    if (wanted := environment.get(SETTING)) is not None:
        return wanted if wanted in PROTOCOLS else None
    if any(name in environment for name in ("TMUX", "STY")):  # These swallow what they do not know.
        return None
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if "kitty" in term or "KITTY_WINDOW_ID" in environment or program == "ghostty":
        return "kitty"
    if program in ("iTerm.app", "WezTerm", "mintty") or environment.get("LC_TERMINAL") == "iTerm2":
        return "iterm2"
    return "sixel" if term.startswith(("foot", "mlterm", "contour")) or "sixel" in term else None


def drawn(image: Any, protocol: str) -> str | None:
    """Return what makes a terminal draw an image, or None where the image cannot be opened.

    Args:
        image: in any form.
        protocol: one of `PROTOCOLS`.
    """
    try:
        small = to_rgb(image)
    except GroundingError:
        return None
    small.thumbnail((SIDE, SIDE))
    return {"kitty": _kitty, "iterm2": _iterm2, "sixel": sixel}[protocol](small)


def _kitty(image: Image.Image) -> str:
    data = base64.b64encode(to_png(image)).decode("ascii")
    chunks = [data[i : i + CHUNK] for i in range(0, len(data), CHUNK)]
    heads = ["a=T,f=100,q=2,", *[""] * (len(chunks) - 1)]  # q=2: the terminal does not answer into the next line.
    more = [1] * (len(chunks) - 1) + [0]
    return "".join(f"\x1b_G{h}m={m};{c}\x1b\\" for h, m, c in zip(heads, more, chunks, strict=True))


def _iterm2(image: Image.Image) -> str:
    data = to_png(image)
    head = f"inline=1;size={len(data)};width={image.width}px;height={image.height}px"
    return f"\x1b]1337;File={head}:{base64.b64encode(data).decode('ascii')}\x07"


def sixel(image: Image.Image) -> str:
    """Return an RGB image in sixels: for each band of six rows, one line of each color that is in it."""
    reduced = image.quantize(COLORS, dither=Image.Dither.NONE)
    palette = reduced.getpalette() or []
    indexes = np.asarray(reduced)
    parts = [f'\x1bP0;1q"1;1;{image.width};{image.height}']
    for color in np.unique(indexes).tolist():  # Levels are percent.
        red, green, blue = (round(level * 100 / 255) for level in palette[3 * color : 3 * color + 3])
        parts.append(f"#{color};2;{red};{green};{blue}")
    for top in range(0, image.height, BAND):
        band = indexes[top : top + BAND]
        weights = (1 << np.arange(len(band)))[:, None]
        lines = [f"#{color}{_runs((band == color) * weights)}" for color in np.unique(band).tolist()]
        parts.append("$".join(lines) + "-")  # "$" goes back to the left, "-" to the next band.
    return "".join(parts) + "\x1b\\"


def _runs(bits: np.ndarray[Any, Any]) -> str:
    """Return a line of sixels, each a column of the band as bits (rows, width), with repetitions counted."""
    columns = (chr(63 + value) for value in bits.sum(0).tolist())
    runs = ((char, len(list(group))) for char, group in itertools.groupby(columns))
    return "".join(f"!{count}{char}" if count > 3 else char * count for char, count in runs)
