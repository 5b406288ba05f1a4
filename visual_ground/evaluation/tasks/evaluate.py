"""`evaluate`: a model on one of the field's tasks."""

from __future__ import annotations

import os
from typing import Any

from visual_ground.evaluation.running.report import EvaluationReport
from visual_ground.evaluation.running.task import Evaluation, Task
from visual_ground.evaluation.tasks.registry import load_task
from visual_ground.model import GroundedModel


def evaluate(
    model: GroundedModel,
    task: str | Task,
    data: str | os.PathLike[str] | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> EvaluationReport:
    """Measure a model on one of the field's tasks.

    Under `accelerate launch` every process calls this; each measures its share, and all get the same report.

    Args:
        model: the grounded model.
        task: its name, or a task of your own.
        data: the folder with its official files, if it reads any; see the page on evaluation.
        work_dir: where image features and records are kept. A killed evaluation continues from there, with the same
            report as one that was not killed. None keeps nothing.
        batch_size: units measured at once.
        seed: of the bootstrap that gives the intervals.
        progress: show progress bars.
        settings: of the task, such as `variant="published"`.

    Raises:
        GroundingValueError: no such task, nothing to measure, or numbers that are not finite.
        GroundingTypeError: a setting that the task does not have, or no data if it needs some.
        GroundingFileError: a file of the data is missing, damaged, or of another kind.
        GroundingStateError: a package that the task needs is not installed.

    Example:
        >>> report = evaluate(model, "vist", data="VIST", work_dir="work")  # doctest: +SKIP
        >>> report.metrics["captions_5_images_4_r1"]  # doctest: +SKIP
        18.2
    """
    chosen = load_task(task, data, **settings) if isinstance(task, str) else task
    return Evaluation(chosen, work_dir, batch_size, seed, progress=progress).report(model)
