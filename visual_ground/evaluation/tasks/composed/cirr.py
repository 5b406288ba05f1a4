"""CIRR: composed retrieval on photos, among all of a split and among six similar ones."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from visual_ground.evaluation.formats import files
from visual_ground.evaluation.formats.composed import read_cirr
from visual_ground.evaluation.measures.composed import recalls
from visual_ground.evaluation.running.composed import composed_plan, values_by_way
from visual_ground.evaluation.running.images import ImageFeatures
from visual_ground.evaluation.running.plan import Plan, Record, Scores
from visual_ground.evaluation.running.task import Task
from visual_ground.model import GroundedModel

RANKS, SUBSET_RANKS = (1, 5, 10, 50), (1, 2, 3)
WAY = "composed"  # the one that goes to the server


class Cirr(Task):
    """Recall of the image that is looked for, in percent, after the query's own image is taken out.

    `r<k>` is among all images of the split, `rs<k>` among the five similar ones. `text_only_` and `image_only_` are the
    same metrics of queries without the image, and without the text. The report's files are those that the server of the
    test set takes; for that set, nothing but the number of `queries` can be measured here.

    Args:
        data: folder with `captions/cap.rc2.<split>.json`, `image_splits/split.rc2.<split>.json`, both also within
            `cirr/`, and the images where the latter says.
        split: "val" or "test1".
    """

    name, unit, dataset = "cirr", "query", "CIRR"

    def __init__(self, data: str | os.PathLike[str], split: str = "val") -> None:
        self.split: str | None = files.choose(split, ("val", "test1"), "split")
        self.primary_metric = "r5" if split == "val" else "queries"
        self.folder, self.settings = Path(data), {"split": split}
        self.composed, self.files = read_cirr(self.folder, split)

    def prepare(self, model: GroundedModel, images: ImageFeatures) -> Plan:
        """Embed the images of the split."""
        return composed_plan(model, images, self.folder, {"cirr": self.composed}, without_reference=True)

    def score(self, records: Sequence[Record]) -> Scores:
        """Return the recalls, and the server's two files."""
        among_all = values_by_way(records, "ranked", lambda ranked, right: recalls(ranked, right, RANKS))
        subset = values_by_way(records, "subset", _subset_recalls)
        whole = {"queries": float(len(records))}
        return Scores({**among_all, **subset}, whole, self._server_files(records))

    def _server_files(self, records: Sequence[Record]) -> Mapping[str, Any]:
        written = {}
        for metric, key, depth in (("recall", "ranked", 50), ("recall_subset", "subset", 3)):
            rankings = {record["query"]: record[key][WAY][:depth] for record in records}
            written[f"cirr-{self.split}-{metric}.json"] = {"version": "rc2", "metric": metric, **rankings}
        return written


def _subset_recalls(ranked: list[str], right: frozenset[str]) -> dict[str, float]:
    return {f"rs{name[1:]}": value for name, value in recalls(ranked, right, SUBSET_RANKS).items()}
