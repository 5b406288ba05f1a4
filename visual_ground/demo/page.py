"""The demo's results for people: a page, a contact sheet, a table in the terminal."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from visual_ground.demo.conversations import Exchange
from visual_ground.generation.output import render_part
from visual_ground.storage.atomic import replacing
from visual_ground.vision.images import to_rgb

STYLE = """body{font-family:sans-serif;max-width:52em;margin:2em auto;padding:0 1em;line-height:1.4}
.user,.model{padding:.5em 1em;border-radius:1em;margin:.4em 0}.user{background:#e8eef7;margin-left:6em}
.model{background:#f3f3f0;margin-right:6em}table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:right}
td:first-child{text-align:left}"""
WIDTH, PICTURE, MARGIN = 900, 96, 16


def table(results: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of the table of recalls, the first one its head."""
    rows = [["", "text to image R@1/5/10", "image to text R@1/5/10"]]
    named = {"adapter, unseen concepts": results["unseen"], "adapter, seen concepts": results["seen"]}
    for name, values in {**named, **results["baselines"]}.items():
        recalls = [values[direction] for direction in ("text_to_image", "image_to_text")]
        rows.append(
            [name.replace("_", " "), *("  ".join(f"{r[k]:5.1f}" for k in ("r1", "r5", "r10")) for r in recalls)]
        )
    return rows


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Return a table in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


def write_page(path: Path, conversations: Mapping[str, Sequence[Exchange]], rows: Sequence[Sequence[str]]) -> None:
    """Write the conversations and the table as one HTML file with its pictures inside."""
    parts = [f'<!doctype html><html><head><meta charset="utf-8"><title>visual_ground</title><style>{STYLE}</style>']
    parts.append("</head><body><h1>What a frozen language model sees and shows</h1>")
    for title, exchanges in conversations.items():
        parts.append(f"<h2>{html.escape(title)}</h2>")
        for exchange in exchanges:
            for who, turn in (("user", exchange.message), ("model", exchange.answer.parts)):
                parts.append(f'<div class="{who}">' + "".join(_render(part) for part in turn) + "</div>")
    parts.append("<h2>Recall in percent</h2><table>")
    parts += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    parts.append("</table></body></html>\n")
    with replacing(path) as temporary:
        temporary.write_text("".join(parts), encoding="utf-8")


def _render(part: Any) -> str:
    return render_part(part, width=128)


def write_contact_sheet(path: Path, conversations: Mapping[str, Sequence[Exchange]]) -> None:
    """Draw the conversations, one below the other, as a PNG."""
    page = Image.new("RGB", (WIDTH, 6000), "white")
    draw = ImageDraw.Draw(page)
    y = MARGIN
    for title, exchanges in conversations.items():
        draw.text((MARGIN, y), title, "black", ImageFont.load_default(20))
        y += 32
        for exchange in exchanges:
            y = _draw_turn(page, draw, y, "you", exchange.message)
            y = _draw_turn(page, draw, y, "model", exchange.answer.parts)
        y += MARGIN
    with replacing(path) as temporary:
        page.crop((0, 0, WIDTH, y)).save(temporary, "PNG")


def _draw_turn(page: Image.Image, draw: ImageDraw.ImageDraw, y: int, who: str, parts: Sequence[Any]) -> int:
    """Draw one turn from height y on; return the height below it."""
    font, left = ImageFont.load_default(15), MARGIN + 70
    draw.text((MARGIN, y), who, "#3465a4" if who == "you" else "#4e7a1e", font)
    x = left
    for part in parts:
        if isinstance(part, str):
            y, x = (y + PICTURE + 6, left) if x > left else (y, x)
            for line in textwrap.wrap(part.strip(), 100):
                draw.text((left, y), line, "black", font)
                y += 20
            continue
        if part.image is None:
            continue
        small = to_rgb(part.image)
        small.thumbnail((PICTURE, PICTURE))
        page.paste(small, (x, y))
        x += PICTURE + 8
    return y + (PICTURE + 6 if x > left else 0) + 6
