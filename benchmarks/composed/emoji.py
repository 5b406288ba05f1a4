"""Composed retrieval on the demo's emoji, each drawn in two ways.

python benchmarks/composed/emoji.py TASK [SEED] [SPLIT] [STEPS]

TASK `same`: a picture, and "A violin, drawn by the same hand.": the text says what, the picture in which way.
TASK `other`: a picture, and "The same, drawn by the other hand.": the picture says what, the text in which way.

Captions say in which way a thing is drawn. Asked with pictures of SPLIT, which were not fitted on, for one of both
drawings of 150 concepts: of those that were fitted on, at even distances, and of those of SPLIT. Then the adapter is
trained for STEPS steps (100), in whose batches both drawings of a thing stand side by side, and asked again.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import CACHE, Query, fitted, report, score
from common import train as train_on

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


def in_pairs(rows: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Shuffle the rows, and leave both drawings of a thing side by side."""
    pairs = [rows[i : i + len(STYLES)] for i in range(0, len(rows), len(STYLES))]
    random.Random(seed).shuffle(pairs)
    return [row for pair in pairs for row in pair]


def _named(concept: emoji.Concept) -> str:
    return emoji.captions(concept)[0].rstrip(".")


def main() -> None:
    """Fit, ask, report."""
    name, seed = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0
    split = sys.argv[3] if len(sys.argv) > 3 else "test"
    steps = int(sys.argv[4]) if len(sys.argv) > 4 else 100
    task = Task(name, seed)
    rows, train, held = task.rows(), task.of("train"), task.of(split)
    with tempfile.TemporaryDirectory() as out:
        model, seconds = fitted(rows, Path(out), seed)
        asked = {"seen": train[:: len(train) // SEEN][:SEEN], "unseen": held}
        queries = {kind: task.queries(wanted, held) for kind, wanted in asked.items()}
        fit_alone = {kind: score(model, *of_kind) for kind, of_kind in queries.items()}
        trained_for = train_on(model, in_pairs(rows, seed), Path(out, "run"), steps, seed)
        trained = {kind: score(model, *of_kind) for kind, of_kind in queries.items()}
    results = {"fitted pairs": len(rows), "fit s": round(seconds), "fit": fit_alone}
    results |= {"steps": steps, "training s": round(trained_for), "trained": trained}
    report(f"emoji_{name}_{'' if split == 'test' else split + '_'}{seed}", {"seed": seed, **results})


if __name__ == "__main__":
    main()
