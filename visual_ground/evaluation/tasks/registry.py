"""The tasks by name."""

from __future__ import annotations

import inspect
import os
from importlib import import_module
from typing import Any

from visual_ground.errors import GroundingTypeError, GroundingValueError
from visual_ground.evaluation.running.task import Task

# Each is "module:class", imported where it is first asked for. A class takes the folder of the data, where it needs
# one, and its settings by name.
TASKS: dict[str, str] = {
    "captions": "visual_ground.evaluation.tasks.answers.captions:Captions",
    "circo": "visual_ground.evaluation.tasks.composed.circo:Circo",
    "cirr": "visual_ground.evaluation.tasks.composed.cirr:Cirr",
    "easy-vqa": "visual_ground.evaluation.tasks.answers.easy_vqa:EasyVQA",
    "emoji": "visual_ground.evaluation.tasks.retrieval.emoji:EmojiRetrieval",
    "fashioniq": "visual_ground.evaluation.tasks.composed.fashioniq:FashionIQ",
    "interleaved": "visual_ground.evaluation.tasks.answers.interleaved:Interleaved",
    "karpathy": "visual_ground.evaluation.tasks.retrieval.karpathy:Karpathy",
    "visdial": "visual_ground.evaluation.tasks.retrieval.visdial:VisDial",
    "vist": "visual_ground.evaluation.tasks.retrieval.vist:Vist",
    "vqav2": "visual_ground.evaluation.tasks.answers.vqav2:VQAv2",
}


def load_task(name: str, data: str | os.PathLike[str] | None = None, **settings: Any) -> Task:
    """Return a task by name.

    Args:
        name: see `TASKS`.
        data: the folder with its official files, where it reads any.
        settings: of the task, see its class.

    Raises:
        GroundingValueError: no such task, or a setting out of its range.
        GroundingTypeError: a setting that the task does not have, or no data where it needs some.
        GroundingFileError: a file is missing or of another kind.
    """
    if name not in TASKS:
        raise GroundingValueError(f"There is no task {name!r}; there are {', '.join(sorted(TASKS))}.")
    module, _, kind = TASKS[name].partition(":")
    cls = getattr(import_module(module), kind)
    known = inspect.signature(cls).parameters
    if unknown := sorted(set(settings) - set(known)):
        theirs = sorted(set(known) - {"data"})
        raise GroundingTypeError(f"The task {name!r} has no settings {unknown}; it has {theirs}.")
    if "data" in known:
        if data is None and known["data"].default is inspect.Parameter.empty:
            raise GroundingTypeError(
                f"The task {name!r} needs data=, the folder with its official files; see docs/evaluation.md."
            )
        settings = settings if data is None else {"data": data, **settings}
    elif data is not None:
        raise GroundingTypeError(f"The task {name!r} takes no data=: it brings its own.")
    task: Task = cls(**settings)
    return task
