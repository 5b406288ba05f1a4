"""CIRCO: composed retrieval among 123,403 unlabelled photos of COCO, several of which are right."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from visual_ground.evaluation.formats import files
from visual_ground.evaluation.formats.composed import read_circo
from visual_ground.evaluation.measures.composed import average_precision_at
from visual_ground.evaluation.running.composed import DEPTH, composed_plan, values_by_way
from visual_ground.evaluation.running.images import ImageFeatures
from visual_ground.evaluation.running.plan import Plan, Record, Scores
from visual_ground.evaluation.running.task import Task
from visual_ground.model import GroundedModel

RANKS = (5, 10, 25, 50)


class Circo(Task):
    """Mean average precision `map<k>` among the best k, in percent; the query's own image stays in, as published.

    `text_only_` and `image_only_` are the same metrics of queries without the image, and without the text. The report's
    file is the one that the server of the test set takes; for that set, nothing but the number of `queries` can be
    measured here.

    Args:
        data: folder with `annotations/<split>.json` and `COCO2017_unlabeled`, which has
            `annotations/image_info_unlabeled2017.json` and the images in `unlabeled2017`.
        split: "val" or "test".
    """

    name, unit, dataset = "circo", "query", "CIRCO"

    def __init__(self, data: str | os.PathLike[str], split: str = "val") -> None:
        self.split: str | None = files.choose(split, ("val", "test"), "split")
        self.primary_metric = "map5" if split == "val" else "queries"
        self.folder, self.settings = Path(data), {"split": split}
        self.composed, self.files = read_circo(self.folder, split)

    def prepare(self, model: GroundedModel, images: ImageFeatures) -> Plan:
        """Embed all images."""
        return composed_plan(model, images, self.folder, {"circo": self.composed}, without_reference=False)

    def score(self, records: Sequence[Record]) -> Scores:
        """Return the precisions, and the server's file."""
        values = values_by_way(records, "ranked", _precisions)
        rankings = {record["query"]: [int(name) for name in record["ranked"]["composed"][:DEPTH]] for record in records}
        return Scores(values, {"queries": float(len(records))}, {f"circo-{self.split}.json": rankings})


def _precisions(ranked: list[str], right: frozenset[str]) -> dict[str, float]:
    return {f"map{k}": 100 * average_precision_at(ranked, right, k) for k in RANKS}
