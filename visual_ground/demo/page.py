"""The demo's results for people: a page in two parts, seen and unseen, and a table in the terminal."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from visual_ground.demo.conversations import CONVERSATIONS, SEEN, UNSEEN, Exchange, Request
from visual_ground.generation.output import data_uri, render_part
from visual_ground.storage.atomic import replacing

STYLE = """body{font-family:system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
body{line-height:1.45}
h1{font-size:1.7em}h2{margin-top:2em;padding:.3em .6em;border-radius:.3em;background:#2f5d50;color:#fff}
h2.unseen{background:#5d3f6a}h3{margin-bottom:.3em}.user,.model{padding:.5em 1em;border-radius:1em;margin:.4em 0}
.user{background:#e8eef7;margin-left:6em}.model{background:#f3f3f0;margin-right:6em}
table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:right}td:first-child{text-align:left}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(10.5em,1fr));gap:.6em}
.card{border:2px solid #b3402e;border-radius:.6em;padding:.5em;font-size:.8em;text-align:center}
.card.right{border-color:#2f8f5b}.card img{width:96px;height:96px;object-fit:contain}"""
# What each part of the page shows.
PARTS = {
    SEEN: (
        "Seen",
        "The adapter was fitted on these things' pictures, as it is on your own collection. The requests are in words "
        "that it was not fitted on.",
    ),
    UNSEEN: (
        "Unseen",
        "No picture and no caption of these things was in the data; what is right here is what the adapter "
        "generalises to.",
    ),
}


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


def request_summary(counts: Mapping[str, int]) -> str:
    """Return in one sentence how many requests were answered with the right picture."""
    return (
        f"Of {counts['asked']} requests for seen things, {counts['answered_with_a_picture']} were answered with a "
        f"picture, {counts['answered_with_the_right_picture']} with the right one of {counts['pictures']}."
    )


def write_page(
    path: Path, conversations: Mapping[str, Sequence[Exchange]], requests: Sequence[Request], results: Mapping[str, Any]
) -> None:
    """Write all as one HTML file with its pictures inside."""
    lines = [f'<!doctype html><html><head><meta charset="utf-8"><title>visual_ground</title><style>{STYLE}</style>']
    lines.append("</head><body><h1>What a frozen language model sees and shows</h1>")
    for part, (title, explanation) in PARTS.items():
        lines.append(f'<h2 class="{part}">{title}</h2><p>{explanation}</p>')
        for talk in CONVERSATIONS:
            if talk.part == part:
                lines += _conversation(talk.title, conversations[talk.title])
        if part == SEEN:
            lines += _requests(requests, results["requests"])
    lines.append("<h2>Recall in percent</h2><table>")
    lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table(results)]
    lines.append("</table></body></html>\n")
    with replacing(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def _conversation(title: str, exchanges: Sequence[Exchange]) -> list[str]:
    lines = [f"<h3>{html.escape(title)}</h3>"]
    for exchange in exchanges:
        for who, turn in (("user", exchange.message), ("model", exchange.answer.parts)):
            lines.append(f'<div class="{who}">' + "".join(render_part(part, width=128) for part in turn) + "</div>")
    return lines


def _requests(requests: Sequence[Request], counts: Mapping[str, int]) -> list[str]:
    lines = [f"<h3>{len(requests)} requests</h3><p>{html.escape(request_summary(counts))}</p>", '<div class="grid">']
    for request in requests:
        images = request.answer.images
        shown = "no picture"
        if images:
            shown = f"{images[0].id}"
        picture = f'<img src="{data_uri(images[0].image, 96)}" alt="{html.escape(shown)}">' if images else ""
        mark = "right" if request.is_right else "wrong"
        lines.append(
            f'<div class="card {mark}" title="{html.escape(request.answer.text.strip())}">'
            f"<div>{html.escape(request.text)}</div>{picture}<div>{html.escape(shown)}</div></div>"
        )
    return [*lines, "</div>"]
