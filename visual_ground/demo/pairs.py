"""The demo's data: its concepts, their pictures in every style, and what is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visual_ground.demo import emoji
from visual_ground.vision.features.cache import FeatureCache

# Which of a concept's captions are fitted on and measured: its name, and a sentence.
CAPTION_KINDS = (0, 1)


class Pairs:
    """The concepts, their pictures in every style, and the pictures' features (concepts, styles, f)."""

    def __init__(self, cache: Path, vision: Any, limit: int | None) -> None:
        concepts = emoji.concepts()
        self.concepts = concepts if limit is None else _subset(concepts, limit)
        self.paths = [[str(emoji.render(c, s, cache / "emoji")) for s in emoji.STYLES] for c in self.concepts]
        features = FeatureCache(cache / "features", vision)
        flat = features.features([path for paths in self.paths for path in paths], progress=True)
        self.features = flat.view(len(self.concepts), len(emoji.STYLES), -1)

    def numbers(self, split: str) -> list[int]:
        """Return the positions of a split's concepts."""
        return [i for i, concept in enumerate(self.concepts) if concept.split == split]

    def examples(self) -> list[dict[str, Any]]:
        """Return the training data: for each concept two captions and a turn of a chat."""
        examples = []
        for i in self.numbers("train"):
            concept = self.concepts[i]
            common = {"image": self.paths[i], "group": concept.code}
            examples += [{**common, "caption": emoji.captions(concept)[kind]} for kind in CAPTION_KINDS]
            turn = {"request": emoji.request(concept), "question": emoji.question(concept)}
            examples.append({**common, "caption": emoji.reply(concept), **turn})
        return examples

    def example_features(self) -> list[Tensor]:
        """Return for each of `examples` its pictures' features (styles, f)."""
        position = {concept.code: i for i, concept in enumerate(self.concepts)}
        return [self.features[position[example["group"]]] for example in self.examples()]

    def captions(self, numbers: Sequence[int], kind: int) -> list[str]:
        """Return the caption of a kind of each of these concepts."""
        return [emoji.captions(self.concepts[i])[kind] for i in numbers]

    def galleries(self, numbers: Sequence[int]) -> list[Tensor]:
        """Return for each style the features (n, f) of these concepts' pictures."""
        return list(self.features[list(numbers)].unbind(1))

    def pairs(self, numbers: Sequence[int]) -> tuple[list[str], Tensor]:
        """Return one caption and one picture's features for each of these concepts; kinds and styles alternate."""
        texts = [emoji.captions(self.concepts[i])[n % 2] for n, i in enumerate(numbers)]
        features = torch.stack([self.features[i, n // 2 % len(emoji.STYLES)] for n, i in enumerate(numbers)])
        return texts, features


def _subset(concepts: Sequence[emoji.Concept], limit: int) -> list[emoji.Concept]:
    """Return the first concepts of each split, and those that the user shows in the conversations."""
    counts: dict[str, int] = {}
    subset = []
    for concept in concepts:
        counts[concept.split] = counts.get(concept.split, 0) + 1
        if counts[concept.split] <= limit or concept.name in ("tiger", "strawberry", "poodle"):
            subset.append(concept)
    return subset
