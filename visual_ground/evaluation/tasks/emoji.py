"""The demo's held-out concepts: emoji that the adapter never saw, found by their descriptions and the other way."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visual_ground.demo import emoji
from visual_ground.demo.baselines import bag_of_words_ridge, chance
from visual_ground.errors import GroundingStateError
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

    A concept has one description and one picture; kinds of descriptions and styles of pictures alternate. Beside it is
    what guessing reaches, `chance`, and ridge regression from the words of a description to the image's features, which
    is fitted to the concepts of the training set.

    Args:
        data: folder for the pictures, which are drawn where they are missing; a temporary one where None.
        split: "test", "validation" or "train".
        baseline: whether to measure the regression, which encodes all training pictures.

    Raises:
        GroundingStateError: the demo's packages are not installed.
    """

    name, primary_metric, unit, dataset = "emoji", "text_to_image_r1", "concept", "emoji concepts"
    files: Sequence[Path] = ()

    def __init__(self, data: str | os.PathLike[str] | None = None, split: str = "test", baseline: bool = True) -> None:
        self.split: str | None = files.choose(split, ("test", "validation", "train"), "split")
        self.settings: Mapping[str, Any] = {"split": split, "baseline": baseline}
        try:
            concepts = emoji.concepts()
        except ImportError as error:
            raise GroundingStateError(
                'The emoji come out of the demo\'s packages. Run pip install "visual-ground[demo]".'
            ) from error
        self.folder = Path(tempfile.mkdtemp() if data is None else data)
        if data is None:
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.concepts = [concept for concept in concepts if concept.split == split]
        self.trained = [concept for concept in concepts if concept.split == "train"] if baseline else []

    def prepare(self, model: GroundedModel, images: ImageFeatures) -> Plan:
        """Draw and read the pictures, and compare all descriptions with all pictures."""
        styles = [emoji.STYLES[number // 2 % len(emoji.STYLES)] for number in range(len(self.concepts))]
        pairs = zip(self.concepts, styles, strict=True)
        found = images.read({concept.code: emoji.render(concept, style, self.folder) for concept, style in pairs})
        described = {concept.code: emoji.captions(concept)[n % 2] for n, concept in enumerate(self.concepts)}
        texts = [described[code] for code in found.names]
        ranks = self._ranks(model, texts, found.features, images) if texts else {}

        def measure(numbers: Sequence[int]) -> list[Record]:
            return [{name: int(of[number]) for name, of in ranks.items()} for number in numbers]

        return Plan(found.names, measure, found.missing)

    def score(self, records: Sequence[Record]) -> Scores:
        """Return the recalls of both ways."""
        values: dict[str, list[list[float]]] = {}
        for record in records:
            for name, rank in record.items():
                for metric, hit in hits(rank).items():
                    values.setdefault(f"{name}_{metric}", []).append(hit)
        return Scores(values, {f"chance_{metric}": value for metric, value in chance(len(records)).items()})

    def _ranks(
        self, model: GroundedModel, texts: Sequence[str], features: Tensor, images: ImageFeatures
    ) -> dict[str, Tensor]:
        """Return the rank of each description's picture, and of each picture's description, by what is measured."""
        parts = [texts[start : start + AT_ONCE] for start in range(0, len(texts), AT_ONCE)]
        vectors = torch.cat([embed_prompts(model, part) for part in parts])
        scores = {"": (vectors @ model.embed_images(image_features=features).T).float().cpu()}
        if self.trained:
            scores[BASELINE] = self._regression(texts, features, images)
        same, ranks = torch.eye(len(texts), dtype=torch.bool), {}
        for name, of in scores.items():
            ranks[f"{name}text_to_image"], ranks[f"{name}image_to_text"] = ranks_of(of, same), ranks_of(of.T, same)
        return ranks

    def _regression(self, texts: Sequence[str], features: Tensor, images: ImageFeatures) -> Tensor:
        drawn = {
            f"{concept.code} {style}": emoji.render(concept, style, self.folder)
            for concept in self.trained
            for style in emoji.STYLES
        }
        read = images.read(drawn)
        known, trained = [], []
        for concept in self.trained:
            names = [f"{concept.code} {style}" for style in emoji.STYLES]
            if all(name in read for name in names):
                captions = emoji.captions(concept)
                known += captions
                trained += [torch.stack([read[name] for name in names]).float().mean(0)] * len(captions)
        return bag_of_words_ridge(known, torch.stack(trained), texts, features.float())
