"""Composed retrieval on the demo's emoji: "The same, drawn by the other hand."

python benchmarks/composed/emoji.py [SEED] [SPLIT]

Every concept is drawn in two styles. Asked with either drawing for the other one, among both drawings of 150 concepts,
which were not fitted on, and among those of as many that were.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from common import CACHE, Query, fitted, report, score

from visual_ground.demo import emoji

TEXT = " The same, drawn by the other hand."
SEEN = 150


def main() -> None:
    """Fit, ask, report."""
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    split = sys.argv[2] if len(sys.argv) > 2 else "test"
    concepts = emoji.concepts()
    drawn = {c.code: [str(emoji.render(c, style, CACHE / "emoji")) for style in emoji.STYLES] for c in concepts}
    train = [concept for concept in concepts if concept.split == "train"]
    rows = [
        {
            "image": drawn[concept.code][style],
            "caption": emoji.captions(concept)[0],
            "group": concept.code,
            "prompt": [drawn[concept.code][1 - style], TEXT],
        }
        for concept in train
        for style in (0, 1)
    ]
    asked = {"unseen": [concept for concept in concepts if concept.split == split], "seen": train[:SEEN]}
    with tempfile.TemporaryDirectory() as out:
        model, seconds = fitted(rows, Path(out), seed)
    results = {}
    for name, chosen in asked.items():
        gallery = [path for concept in chosen for path in drawn[concept.code]]
        guess = 1 / (len(gallery) - 1)
        queries = [
            # Drawings of a concept stand side by side: 0 and 1, 2 and 3.
            Query([picture, TEXT], picture, TEXT.strip(), frozenset([number ^ 1]), number, guess)
            for number, picture in enumerate(gallery)
        ]
        results[name] = score(model, queries, gallery)
    name = f"emoji_{seed}" if split == "test" else f"emoji_{split}_{seed}"
    report(name, {"seed": seed, "fitted pairs": len(rows), "fit seconds": round(seconds), **results})


if __name__ == "__main__":
    main()
