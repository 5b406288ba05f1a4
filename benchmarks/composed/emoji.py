"""Composed retrieval on the demo's emoji, each drawn in two ways.

python benchmarks/composed/emoji.py TASK [SEED] [SPLIT]

TASK `same`: a picture, and "A violin, drawn by the same hand.": the text says what, the picture in which way.
TASK `other`: a picture, and "The same, drawn by the other hand.": the picture says what, the text in which way.

Captions say in which way a thing is drawn. Asked with pictures of SPLIT, which were not fitted on, for one of both
drawings of 150 concepts: of those that were fitted on, at even distances, and of those of SPLIT.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import CACHE, Query, fitted, report, score

from visual_ground.demo import emoji

SEEN = 150
STYLES = range(len(emoji.STYLES))
# How OpenMoji and Twemoji draw, as the captions say it.
WAYS = ("with black outlines", "in flat colours")
Concepts = list[emoji.Concept]


class Task:
    """Rows to fit and queries to ask.

    Args:
        name: "same" or "other".
        seed: of the pictures that queries show.
    """

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.draw, self.concepts = name, random.Random(seed), emoji.concepts()
        self.drawn = {c.code: [str(emoji.render(c, s, CACHE / "emoji")) for s in emoji.STYLES] for c in self.concepts}

    def of(self, split: str) -> Concepts:
        """Return a split's concepts."""
        return [concept for concept in self.concepts if concept.split == split]

    def ask(self, wanted: emoji.Concept, style: int, shown: Concepts) -> tuple[str, str]:
        """Return the picture and the text that ask for a drawing; `shown` are what the picture may show."""
        if self.name == "other":
            return self.drawn[wanted.code][1 - style], " The same, drawn by the other hand."
        other = self.draw.choice([concept for concept in shown if concept != wanted])
        return self.drawn[other.code][style], f" {_named(wanted)}, drawn by the same hand."

    def rows(self) -> list[dict[str, Any]]:
        """Return both drawings of each training concept, each with a caption and a prompt."""
        train = self.of("train")
        return [
            {
                "image": self.drawn[concept.code][style],
                "caption": f"{_named(concept)}, drawn {WAYS[style]}.",
                "group": f"{concept.code} {style}",
                "prompt": list(self.ask(concept, style, train)),
            }
            for concept in train
            for style in STYLES
        ]

    def queries(self, wanted: Concepts, shown: Concepts) -> tuple[list[Query], list[str]]:
        """Return a query for each drawing of these concepts, and all these drawings."""
        gallery = [path for concept in wanted for path in self.drawn[concept.code]]
        # Who knows the thing guesses the drawing; who knows the drawing guesses the thing.
        guess = 1 / len(STYLES) if self.name == "same" else 1 / len(wanted)
        queries = []
        for number in range(len(gallery)):
            concept, style = wanted[number // len(STYLES)], number % len(STYLES)
            picture, text = self.ask(concept, style, shown)
            hidden = gallery.index(picture) if picture in gallery else None
            queries.append(Query([picture, text], picture, text.strip(), frozenset([number]), hidden, guess))
        return queries, gallery


def _named(concept: emoji.Concept) -> str:
    return emoji.captions(concept)[0].rstrip(".")


def main() -> None:
    """Fit, ask, report."""
    name, seed = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0
    split = sys.argv[3] if len(sys.argv) > 3 else "test"
    task = Task(name, seed)
    rows, train, held = task.rows(), task.of("train"), task.of(split)
    with tempfile.TemporaryDirectory() as out:
        model, seconds = fitted(rows, Path(out), seed)
    asked = {"seen": train[:: len(train) // SEEN][:SEEN], "unseen": held}
    results = {kind: score(model, *task.queries(wanted, held)) for kind, wanted in asked.items()}
    ending = "" if split == "test" else f"{split}_"
    report(
        f"emoji_{name}_{ending}{seed}", {"seed": seed, "fitted pairs": len(rows), "fit s": round(seconds), **results}
    )


if __name__ == "__main__":
    main()
