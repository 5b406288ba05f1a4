"""`EvaluationReport`: the numbers of one evaluation, with all that they depend on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visual_ground.evaluation.running.bootstrap import CONFIDENCE
from visual_ground.model import GroundedModel
from visual_ground.storage.atomic import replacing


@dataclass(frozen=True)
class EvaluationReport:
    """What an evaluation measured, of what, and how. It holds no times: the same evaluation gives the same report.

    Args:
        task: its name.
        dataset: what it is called on an adapter's card.
        split: of the dataset, if it has several.
        primary_metric: the metric that decides between two models.
        metrics: numbers by name.
        intervals: by metric, its 95 % interval by bootstrap over the units.
        unit: what was measured one by one, such as "story".
        counts: how many `units` there are, and other counts.
        missing: what was left out, by reason: how many, and their names.
        settings: of the task, of the measuring (`batch_size`) and of the intervals (`seed`, `samples`).
        model: names, dtype and fingerprints.
        data: hashes of the official files.
        versions: of Python and the packages.
        files: what `save` writes beside the report, such as results for an official server.
    """

    task: str
    dataset: str
    split: str | None
    primary_metric: str
    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    unit: str
    counts: Mapping[str, int]
    missing: Mapping[str, Sequence[str]]
    settings: Mapping[str, Any]
    model: Mapping[str, Any]
    data: Mapping[str, str]
    versions: Mapping[str, str]
    files: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return all but the files as JSON-ready values."""
        values = {name: value for name, value in vars(self).items() if name != "files"}
        missing = {reason: {"count": len(names), "names": list(names)} for reason, names in self.missing.items()}
        intervals = {name: list(interval) for name, interval in self.intervals.items()}
        return {**values, "confidence": CONFIDENCE, "intervals": intervals, "missing": missing}

    def to_json(self) -> str:
        """Return `to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write the report, and the files beside it as `<stem>-<name>`; return their paths.

        Raises:
            GroundingFileError: a file cannot be written; none is half-written.
        """
        path = Path(path)
        texts = {path: self.to_json() + "\n"}
        texts |= {path.with_name(f"{path.stem}-{name}"): json.dumps(value) for name, value in self.files.items()}
        for place, text in texts.items():
            with replacing(place) as temporary:
                temporary.write_text(text)
        return list(texts)

    def record(self, model: GroundedModel) -> None:
        """Put the numbers into the active adapter's report, and so onto its card the next time that it is saved."""
        report = model.active.report
        pairs = self.counts["units"]
        model.active.report = report.measured(self.dataset, dict(self.metrics), pairs, split=self.split)

    def __str__(self) -> str:
        lines = [f"{self.dataset}{f', {self.split}' if self.split else ''}: {self.counts['units']} x {self.unit}"]
        for name, value in self.metrics.items():
            low, high = self.intervals.get(name, (None, None))
            lines.append(f"  {name}: {value:.2f}" + ("" if low is None else f" ({low:.2f} to {high:.2f})"))
        return "\n".join([*lines, *(f"  left out: {len(names)} {why}" for why, names in self.missing.items() if names)])
