"""Composed retrieval on easy-VQA's pictures of shapes: "The same shape in blue."

python benchmarks/composed/easy_vqa.py [SEED]

A picture shows one of three shapes in one of eight colours, anywhere and of any size. Fitted on the package's training
pictures, asked with its test pictures for test pictures.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path

import easy_vqa
from common import Query, fitted, report, score

DATA = Path(easy_vqa.__file__).parent / "data"
SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("red", "green", "blue", "black", "teal", "brown", "gray", "yellow")
FITTED, GALLERY, QUERIES = 1000, 400, 300


def things(split: str, count: int, seed: int) -> list[tuple[str, str, str]]:
    """Return pictures with the shape and the colour that they show, as the package's questions say."""
    told: dict[int, dict[str, str]] = {}
    for _, answer, number in json.loads((DATA / split / "questions.json").read_text()):
        kind = "shape" if answer in SHAPES else "colour" if answer in COLOURS else None
        if kind:
            told.setdefault(number, {})[kind] = answer
    pictures = DATA / split / "images"
    known = [
        (str(pictures / f"{n}.png"), one["shape"], one["colour"]) for n, one in sorted(told.items()) if len(one) > 1
    ]
    return random.Random(seed).sample(known, count)


def main() -> None:
    """Fit, ask, report."""
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    train, test, choose = things("train", FITTED, seed), things("test", GALLERY, seed), random.Random(seed)
    rows = []
    for picture, shape, colour in train:
        # Asked for by a picture of the same shape in another colour.
        asked = choose.choice([one for one, s, c in train if s == shape and c != colour])
        article = "An" if shape[0] in "aeiou" else "A"
        caption = f"{article} {colour} {shape}."
        prompt = [asked, f" The same shape in {colour}."]
        rows.append({"image": picture, "caption": caption, "group": f"{colour} {shape}", "prompt": prompt})
    queries = []
    for number, (picture, shape, colour) in enumerate(test[:QUERIES]):
        wanted, text = choose.choice([c for c in COLOURS if c != colour]), " The same shape in {}."
        right = frozenset(n for n, (_, s, c) in enumerate(test) if (s, c) == (shape, wanted))
        text = text.format(wanted)
        queries.append(Query([picture, text], picture, text.strip(), right, number, 1 / len(SHAPES)))
    with tempfile.TemporaryDirectory() as out:
        model, seconds = fitted(rows, Path(out), seed)
        results = score(model, queries, [picture for picture, _, _ in test])
    report(f"easy_vqa_{seed}", {"seed": seed, "fitted pairs": len(rows), "fit seconds": round(seconds), **results})


if __name__ == "__main__":
    main()
