"""FashionIQ: composed retrieval of dresses, shirts and tops, each kind among its own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visual_ground.evaluation.formats import files
from visual_ground.evaluation.formats.composed import read_fashioniq
from visual_ground.evaluation.measures.composed import recalls
from visual_ground.evaluation.running.composed import WAYS, composed_plan, values_by_way
from visual_ground.evaluation.running.images import ImageFeatures
from visual_ground.evaluation.running.plan import Plan, Record, Scores
from visual_ground.evaluation.running.task import Task
from visual_ground.model import GroundedModel

CATEGORIES = ("dress", "shirt", "toptee")
RANKS = (10, 50)


class FashionIQ(Task):
    """Recall at 10 and 50 in percent, of each category and, as `r10` and `r50`, the mean of the three.

    A query's two captions are read as one, joined by "and"; its own image stays among those that are searched, as
    published. `text_only_` and `image_only_` are the same metrics of queries without the image, and without the text.
    The report's files have, for each query, its candidate, its text and the ranking.

    Args:
        data: folder with `captions/cap.<category>.<split>.json`, `image_splits/split.<category>.<split>.json` and
            `images`.
        split: "val", or "test", for which nothing but the number of `queries` can be measured.
    """

    name, unit, dataset = "fashioniq", "query", "FashionIQ"

    def __init__(self, data: str | os.PathLike[str], split: str = "val") -> None:
        self.split: str | None = files.choose(split, ("val", "test"), "split")
        self.primary_metric = "r10" if split == "val" else "queries"
        self.folder, self.settings = Path(data), {"split": split}
        read = {category: read_fashioniq(self.folder, category, split) for category in CATEGORIES}
        self.sets = {category: composed for category, (composed, _) in read.items()}
        self.files = [path for _, paths in read.values() for path in paths]

    def prepare(self, model: GroundedModel, images: ImageFeatures) -> Plan:
        """Embed the images of the three categories."""
        return composed_plan(model, images, self.folder, self.sets, without_reference=False)

    def score(self, records: Sequence[Record]) -> Scores:
        """Return the recalls, and each category's rankings."""
        found = values_by_way(records, "ranked", lambda ranked, right: recalls(ranked, right, RANKS))
        values: dict[str, list[list[float]]] = {}
        for metric, units in found.items():
            for category in CATEGORIES:
                pairs = zip(records, units, strict=True)
                values[f"{category}_{metric}"] = [unit if one["set"] == category else [] for one, unit in pairs]
        return Scores(values, self._means(values) | {"queries": float(len(records))}, self._rankings(records))

    def _means(self, values: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, float]:
        """Return the means of the categories' recalls; there are none unless all three were measured."""
        means = {}
        for metric in [f"{prefix}r{k}" for prefix in WAYS.values() for k in RANKS]:
            of_each = [[one for unit in values.get(f"{name}_{metric}", ()) for one in unit] for name in CATEGORIES]
            if all(of_each):
                means[metric] = float(np.mean([np.mean(of_one) for of_one in of_each]))
        return means

    def _rankings(self, records: Sequence[Record]) -> dict[str, Any]:
        return {
            f"fashioniq-{category}-{self.split}.json": [
                {"candidate": one["reference"], "text": one["text"], "ranking": one["ranked"]["composed"]}
                for one in records
                if one["set"] == category
            ]
            for category in CATEGORIES
        }
