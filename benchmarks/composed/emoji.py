"""Composed retrieval on emoji: "The same, drawn by the other hand", and "Another one of this kind, about KEYWORD".

python benchmarks/composed/emoji.py [SEED]

Every concept is drawn twice, by OpenMoji and by Twemoji. The first relation is asked with pictures that were not fitted
on: drawings of fitted concepts, mirrored, turned and made smaller in a new way. The second is asked with combinations
that were not fitted on: the picture was asked with other keywords, and the keyword with other pictures. Only keywords
that concepts of several kinds have are asked with, so that the picture has to tell the kind.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from common import CACHE, Query, fitted, report, score
from PIL import Image, ImageOps

from visual_ground.demo import emoji

CONCEPTS, KEYWORDS, PICTURES = 150, 60, 3
SAME = "The same, drawn by the other hand: "
OTHER = "Another one of this kind, about {}: "


def view(path: Path, seed: int) -> Image.Image:
    """Return a drawing mirrored, turned by up to 12 degrees and made smaller, another way for every seed."""
    choose, drawn = random.Random(f"{path.name} {seed}"), Image.open(path).convert("RGB")
    drawn = ImageOps.mirror(drawn) if choose.random() < 0.5 else drawn
    drawn = drawn.rotate(choose.uniform(-12, 12), Image.Resampling.BICUBIC, fillcolor="white")
    size = round(drawn.width * choose.uniform(0.75, 1))
    page = Image.new("RGB", drawn.size, "white")
    free = drawn.width - size
    page.paste(drawn.resize((size, size)), (choose.randint(0, free), choose.randint(0, free)))
    return page


class Data:
    """The trained concepts, and what is asked."""

    def __init__(self, seed: int) -> None:
        self.choose = random.Random(seed)
        self.concepts = [concept for concept in emoji.concepts() if concept.split == "train"]
        paths = [[emoji.render(c, style, CACHE / "emoji") for style in emoji.STYLES] for c in self.concepts]
        self.gallery = [path for of_concept in paths for path in of_concept]

    def row(self, number: int, prompt: list[Any]) -> dict[str, Any]:
        """Return the row of a picture of the gallery, which a prompt asks for."""
        hand, phrase = ("first", "second")[number % 2], self.concepts[number // 2].phrase
        caption = f"{phrase[0].upper()}{phrase[1:]}, drawn by the {hand} hand."
        return {"image": str(self.gallery[number]), "caption": caption, "group": number, "prompt": prompt}

    def same(self) -> tuple[list[dict[str, Any]], list[Query]]:
        """Return rows and queries: the same, drawn by the other hand."""
        rows, queries = [], []
        for concept in self.choose.sample(range(len(self.concepts)), CONCEPTS):
            for number in (2 * concept, 2 * concept + 1):
                target, path = number ^ 1, self.gallery[number]
                rows += [self.row(target, [SAME, shown]) for shown in (Image.open(path).convert("RGB"), view(path, 0))]
                asked = view(path, 1)
                right = frozenset([target])
                queries.append(Query([SAME, asked], asked, SAME, right, number, 1 / (len(self.gallery) - 1)))
        return rows, queries[::2]

    def keywords(self) -> tuple[list[dict[str, Any]], list[Query]]:
        """Return rows and queries: another one of this kind, about a keyword."""
        having: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        of_kind = defaultdict(list)
        for number, concept in enumerate(self.concepts):
            of_kind[concept.kind].append(number)
            for keyword in concept.keywords:
                having[keyword][concept.kind].append(number)
        large = {kind for kind, members in of_kind.items() if len(members) >= 12}
        shared = sorted(k for k, kinds in having.items() if len(set(kinds) & large) >= 2)
        # A few pictures of each kind ask for all keywords, so that each comes with several.
        asking = {kind: self.choose.sample(of_kind[kind], PICTURES + 1) for kind in sorted(large)}
        rows, queries = [], []
        for keyword in self.choose.sample(shared, min(KEYWORDS, len(shared))):
            kinds = sorted(set(having[keyword]) & large)
            for kind in kinds:
                targets = having[keyword][kind]
                free = [i for i in asking[kind] if i not in targets]
                self.choose.shuffle(free)
                text, right = OTHER.format(keyword), frozenset(2 * t + style for t in targets for style in (0, 1))
                for asked in free[1:]:
                    target = 2 * self.choose.choice(targets) + self.choose.randrange(2)
                    rows.append(self.row(target, [text, str(self.gallery[2 * asked])]))
                if len(free) > 1:
                    picture = self.gallery[2 * free[0]]
                    queries.append(Query([text, picture], picture, text, right, 2 * free[0], 1 / len(kinds)))
        return rows, queries


def main() -> None:
    """Fit both relations together, ask, report."""
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    data = Data(seed)
    (same, asked_same), (others, asked_others) = data.same(), data.keywords()
    with tempfile.TemporaryDirectory() as out:
        model, seconds = fitted([*same, *others], Path(out), seed)
        found = {
            "the same, drawn by the other hand": score(model, asked_same, data.gallery),
            "another one of this kind, about a keyword": score(model, asked_others, data.gallery),
            "both": score(model, [*asked_same, *asked_others], data.gallery),
        }
    report(
        f"emoji_{seed}", {"seed": seed, "fitted pairs": len(same) + len(others), "fit seconds": round(seconds), **found}
    )


if __name__ == "__main__":
    main()
