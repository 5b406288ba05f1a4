"""The settings of a run that an adapter is saved with, and its card shows."""

from __future__ import annotations

import math
from importlib.metadata import version
from typing import Any

from transformers import TrainingArguments

from visual_ground.model import GroundedModel

# The arguments that an adapter's card shows: those that decide what is learnt, and so what a reader needs to train
# another adapter alike. Folders, logging and the layout in memory are the machine's business.
RECORDED_ARGUMENTS = (
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "caption_loss_scale",
    "retrieval_loss_scale",
    "concat_captions_prob",
    "captioning_fraction",
    "max_caption_length",
    "seed",
)


def record_settings(model: GroundedModel, args: TrainingArguments, examples: Any) -> None:
    """Note on the adapter's card that it is trained here, and how; pairs of a stream are not counted."""
    pairs = {"pairs": len(examples)} if hasattr(examples, "__len__") else {}
    settings = {name: _recorded(getattr(args, name)) for name in RECORDED_ARGUMENTS}
    model.active.record_training({**pairs, "library_version": version("visual-ground"), **settings})


def _recorded(value: Any) -> Any:
    """Return a value as JSON has it, which knows no infinity: `max_grad_norm=inf` clips nothing."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
