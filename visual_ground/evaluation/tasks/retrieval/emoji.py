"""The demo's held-out concepts: emoji that the adapter never saw, found by their descriptions and the other way."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visual_ground.demo import emoji
from visual_ground.demo.baselines import bag_of_words_ridge, chance
from visual_ground.demo.pairs import CAPTION_KINDS
from visual_ground.errors import needing
from visual_ground.evaluation.formats import files
from visual_ground.evaluation.metrics import hits, ranks_of
from visual_ground.evaluation.running.images import ImageFeatures
from visual_ground.evaluation.running.plan import Plan, Record, Scores
from visual_ground.evaluation.running.prompts import embed_prompts
from visual_ground.evaluation.running.task import Task
from visual_ground.model import GroundedModel

AT_ONCE = 64
BASELINE = "bag_of_words_"


class EmojiRetrieval(Task):
    """Recall at 1, 5 and 10 both ways, in percent, among the pictures of one split's concepts, as the demo measures it.

    A figure is the mean over both descriptions of a concept and both ways of drawing it, each way a gallery of its own.
    Beside it is what guessing reaches, `chance`, and ridge regression from the words of a description to the image's
    features, which is fitted to the concepts of the training set.

    Args:
        data: folder for the pictures, which are drawn where they are missing; a temporary one where None.
        split: "test", "validation" or "train".
        baseline: whether to measure the regression, which encodes all training pictures.
    """

    name, primary_metric, unit, dataset = "emoji", "text_to_image_r1", "concept", "emoji concepts"
    files: Sequence[Path] = ()

    def __init__(self, data: str | os.PathLike[str] | None = None, split: str = "test", baseline: bool = True) -> None:
        self.split: str | None = files.choose(split, ("test", "validation", "train"), "split")
        self.settings: Mapping[str, Any] = {"split": split, "baseline": baseline}
        with needing('The emoji come out of the demo\'s packages. Run pip install "visual-ground[demo]".'):
            concepts = emoji.concepts()
        self.folder = Path(tempfile.mkdtemp() if data is None else data)
        if data is None:
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.concepts = [concept for concept in concepts if concept.split == split]
        self.trained = [concept for concept in concepts if concept.split == "train"] if baseline else []

    def prepare(self, model: GroundedModel, images: ImageFeatures) -> Plan:
        """Draw and read the pictures, and compare all descriptions with all pictures of each way of drawing."""
        found = images.read(self._drawn(self.concepts))
        whole = [c for c in self.concepts if all(f"{c.code} {style}" in found for style in emoji.STYLES)]
        galleries = (
            [torch.stack([found[f"{c.code} {style}"] for c in whole]) for style in emoji.STYLES] if whole else []
        )
        ranks = self._ranks(model, whole, galleries, images) if whole else {}

        def measure(numbers: Sequence[int]) -> list[Record]:
            return [{name: [int(of[number]) for of in each] for name, each in ranks.items()} for number in numbers]

        return Plan([concept.code for concept in whole], measure, found.missing)

    def score(self, records: Sequence[Record]) -> Scores:
        """Return the recalls of both ways."""
        values: dict[str, list[list[float]]] = {}
        for record in records:
            for name, ranks in record.items():
                each = [hits(rank) for rank in ranks]
                for metric in each[0]:
                    values.setdefault(f"{name}_{metric}", []).append([hit for of in each for hit in of[metric]])
        return Scores(values, {f"chance_{metric}": value for metric, value in chance(len(records)).items()})

    def _drawn(self, concepts: Sequence[emoji.Concept]) -> dict[str, Path]:
        return {
            f"{one.code} {style}": emoji.render(one, style, self.folder) for one in concepts for style in emoji.STYLES
        }

    def _ranks(
        self,
        model: GroundedModel,
        concepts: Sequence[emoji.Concept],
        galleries: Sequence[Tensor],
        images: ImageFeatures,
    ) -> dict[str, list[Tensor]]:
        """Return the rank of each description's picture, and of each picture's description, by what is measured.

        For each kind of description and each gallery of features (n, f) there is a tensor (n,).
        """
        same = torch.eye(len(concepts), dtype=torch.bool)
        ranks: dict[str, list[Tensor]] = defaultdict(list)
        known = self._pairs_to_regress(images) if self.trained else None
        pictures = [model.embed_images(image_features=features) for features in galleries]
        for kind in CAPTION_KINDS:
            texts = [emoji.captions(concept)[kind] for concept in concepts]
            parts = [texts[start : start + AT_ONCE] for start in range(0, len(texts), AT_ONCE)]
            vectors = torch.cat([embed_prompts(model, part) for part in parts])
            scores = {"": [(vectors @ of_style.T).float().cpu() for of_style in pictures]}
            if known:
                scores[BASELINE] = [bag_of_words_ridge(*known, texts, features.float()) for features in galleries]
            for name, each in scores.items():
                ranks[f"{name}text_to_image"] += [ranks_of(of, same) for of in each]
                ranks[f"{name}image_to_text"] += [ranks_of(of.T, same) for of in each]
        return ranks

    def _pairs_to_regress(self, images: ImageFeatures) -> tuple[list[str], Tensor]:
        """Return the descriptions of the training set, and for each the mean features (n, f) of its pictures."""
        read = images.read(self._drawn(self.trained))
        texts, features = [], []
        for concept in self.trained:
            names = [f"{concept.code} {style}" for style in emoji.STYLES]
            if all(name in read for name in names):
                captions = emoji.captions(concept)
                texts += captions
                features += [torch.stack([read[name] for name in names]).float().mean(0)] * len(captions)
        return texts, torch.stack(features)
