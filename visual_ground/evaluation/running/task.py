"""`Task`: one of the field's evaluations. `Evaluation`: a task, and where and how it is measured."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from visual_ground.errors import GroundingValueError
from visual_ground.evaluation.running import identity
from visual_ground.evaluation.running.bootstrap import bootstrap_intervals
from visual_ground.evaluation.running.images import ImageFeatures
from visual_ground.evaluation.running.plan import Plan, Record, Scores
from visual_ground.evaluation.running.records import Records
from visual_ground.evaluation.running.report import EvaluationReport
from visual_ground.model import GroundedModel
from visual_ground.processes import Processes
from visual_ground.progress import progress_bar


class Task(Protocol):
    """A task is made with its folder and settings, reads its files there and then, and can measure any model.

    A class that names this one as its base gets `__call__`, and so is an `Evaluator`. A file that is missing or of
    another kind raises GroundingFileError; a setting out of its range, an entry that is missing, ids that come twice or
    do not match raise GroundingValueError.

    Attributes:
        name: as in `visual_ground.evaluate(model, NAME)`.
        primary_metric: the metric that decides between two models, one of those that `score` gives.
        unit: what is measured one by one and resampled for intervals, in the singular, such as "story".
        dataset: what it is called on an adapter's card, with whatever makes its numbers another measurement.
        split: of the dataset, or None.
        settings: what was chosen, JSON values; they tell the records of one evaluation from another's.
        files: the official files that were read; their hashes are in the report.
    """

    name: str
    primary_metric: str
    unit: str
    dataset: str
    split: str | None
    settings: Mapping[str, Any]
    files: Sequence[Path]

    def prepare(self, model: GroundedModel, images: ImageFeatures) -> Plan:
        """Read the images, and return the units and how to measure them. Runs without gradients."""
        ...

    def score(self, records: Sequence[Record]) -> Scores:
        """Return the numbers of the records of all units, which are in the plan's order; needs no model."""
        ...

    def __call__(self, model: GroundedModel) -> dict[str, float]:
        """Return the metrics; nothing is kept. `Evaluation` keeps image features and records."""
        return Evaluation(self)(model)


@dataclass(frozen=True)
class Evaluation:
    """A task, and where and how it is measured; an `Evaluator`.

    Args:
        task: the task.
        work_dir: where image features and records are kept. A killed evaluation goes on from there, and the same one
            is not measured again; in several processes, all use it. None keeps nothing.
        batch_size: units measured at once.
        seed: of the bootstrap.
        samples: draws of the bootstrap.
        progress: show progress bars.

    Raises:
        GroundingValueError: batch_size or samples below 1.
    """

    task: Task
    work_dir: str | os.PathLike[str] | None = None
    batch_size: int = 16
    seed: int = 0
    samples: int = 1000
    progress: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "samples"):
            if getattr(self, name) < 1:
                raise GroundingValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    @property
    def name(self) -> str:
        """The task's."""
        return self.task.name

    @property
    def primary_metric(self) -> str:
        """The task's."""
        return self.task.primary_metric

    def __call__(self, model: GroundedModel) -> dict[str, float]:
        """Return the metrics."""
        return dict(self.report(model).metrics)

    @torch.no_grad()
    def report(self, model: GroundedModel) -> EvaluationReport:
        """Measure a model; every process of an `accelerate launch` calls this, and gets the same.

        Raises:
            GroundingValueError: nothing to measure, ids that come twice, or numbers that are not finite.
            GroundingFileError: nothing can be written to `work_dir`.
        """
        was_training, processes = model.training, Processes.launched()
        model.eval()
        try:
            with processes.folder(self.work_dir) as folder:
                progress = self.progress and processes.is_main
                images = ImageFeatures(model.vision, folder / "features", processes, progress=progress)
                plan = self.task.prepare(model, images)
                plan.check(self.name)
                about = self._about(model, plan)
                records = Records(folder / f"{self.name}-{_digest(about, plan)}")
                self._measure(plan, records, processes, progress)
                return self._scored(plan, records.read(plan.units), about)
        finally:
            model.train(was_training)

    def _measure(self, plan: Plan, records: Records, processes: Processes, progress: bool) -> None:
        """Measure the batches that have no records yet; this process its share of them."""
        known, units = records.known(processes), plan.units
        batches = [range(i, min(i + self.batch_size, len(units))) for i in range(0, len(units), self.batch_size)]
        todo = [batch for batch in batches if not all(units[number] in known for number in batch)]
        share = processes.share(todo)
        total = sum(map(len, share))
        with progress_bar(self.name, self.task.unit, total, progress) as bar:
            for batch in share:
                records.add([units[number] for number in batch], plan.measure(list(batch)))
                bar.update(len(batch))
        records.join(processes)

    def _about(self, model: GroundedModel, plan: Plan) -> dict[str, Any]:
        """Return the parts of the report that say what was measured and how."""
        task = self.task
        return {
            "task": task.name,
            "dataset": task.dataset,
            "split": task.split,
            "unit": task.unit,
            "counts": {"units": len(plan.units), **plan.counts},
            "missing": {reason: list(names) for reason, names in plan.missing.items() if names},
            "settings": {**task.settings, "batch_size": self.batch_size},
            "model": identity.describe_model(model),
            "data": identity.hashes_of(task.files),
            "versions": identity.versions(),
        }

    def _scored(self, plan: Plan, records: Sequence[Record], about: dict[str, Any]) -> EvaluationReport:
        scores = self.task.score(records)
        metrics = scores.means()
        if self.task.primary_metric not in metrics:
            raise GroundingValueError(
                f"{self.name}: nothing gives the metric {self.task.primary_metric!r}, only {sorted(metrics)} were "
                "measured. Check the settings, and that the data have what this metric needs."
            )
        intervals = {}
        means = [name for name in metrics if name not in scores.whole]
        if len(records) > 1 and means:
            bounds = bootstrap_intervals(*scores.sums(), self.samples, self.seed)
            intervals = {name: (low, high) for name, (low, high) in zip(means, bounds.tolist(), strict=True)}
        about["settings"] |= {"seed": self.seed, "samples": self.samples}
        return EvaluationReport(
            **about, primary_metric=self.primary_metric, metrics=metrics, intervals=intervals, files=scores.files
        )


def _digest(about: Mapping[str, Any], plan: Plan) -> str:
    """Return what names the folder of an evaluation's records: all that they depend on, the units' order included."""
    return identity.digest_of({**about, "units": list(plan.units)})
