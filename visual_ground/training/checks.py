"""What a run refuses before its first step: arguments that have no meaning here, and foreign parameters."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback
from transformers.trainer import OPTIMIZER_NAME

from visual_ground.errors import GroundingStateError, GroundingTypeError, GroundingValueError
from visual_ground.lm.base.peft import trained_parameters
from visual_ground.model import GroundedModel
from visual_ground.training.arguments import GroundingTrainingArguments

logger = logging.getLogger(__name__)

# Trainer's own arguments that mean something here.
OPTIONS = ("callbacks", "optimizers", "optimizer_cls_and_kwargs")
# Why the others do not.
REFUSED_OPTIONS = {
    "data_collator": "batches are made by the trainer's own collator",
    "processing_class": "the model has its tokenizer and image processor, and no checkpoint needs them",
    "model_init": "the adapter of the given model is trained in place",
    "compute_loss_func": "pass loss=, see visual_ground.training.losses.objective.Loss",
    "compute_metrics": "pass evaluator=, see visual_ground.evaluation.Evaluator",
    "preprocess_logits_for_metrics": "logits of a whole batch never exist; pass evaluator=",
}

# Callbacks of transformers that can upload more than an adapter, by the variable that asks for it, and what it is. Two
# make a plain `Trainer` of the whole objective, which also uploads the output folder where `push_to_hub` is set.
WHOLE_UPLOADS = {
    "WandbCallback": ("WANDB_LOG_MODEL", "the whole language model"),
    "DVCLiveCallback": ("HF_DVCLIVE_LOG_MODEL", "the whole language model, or the output folder"),
    "CometCallback": ("COMET_LOG_ASSETS", "the output folder"),
    "DagsHubCallback": ("HF_DAGSHUB_LOG_ARTIFACTS", "the output folder and the training data"),
}
NOT_ASKED = ("", "0", "false", "no", "off", "none")


def check_arguments(args: Any, options: Mapping[str, Any]) -> GroundingTrainingArguments:
    """Return the settings of a run; the default ones where None.

    Raises:
        GroundingTypeError: another class of settings, or an argument of `Trainer` that has no meaning here.
    """
    if args is not None and not isinstance(args, GroundingTrainingArguments):
        raise GroundingTypeError(
            f"args must be GroundingTrainingArguments, got {type(args).__name__}. They take the same settings, with "
            "other defaults (learning_rate is 1e-3 and not 5e-5): GroundingTrainingArguments(output_dir=...)."
        )
    for name, value in options.items():
        if name not in OPTIONS and value is not None:
            reason = REFUSED_OPTIONS.get(name, f"it takes {', '.join(OPTIONS)}")
            raise GroundingTypeError(f"GroundingTrainer takes no {name}=: {reason}.")
    return GroundingTrainingArguments() if args is None else args


def check_callbacks(callbacks: Iterable[TrainerCallback]) -> None:
    """Raise GroundingValueError where a callback would upload the LM, or the evaluation pictures of the output folder.

    Args:
        callbacks: of the run, those of `report_to` among them.
    """
    for callback in callbacks:
        for name in {base.__name__ for base in type(callback).__mro__} & set(WHOLE_UPLOADS):
            variable, what = WHOLE_UPLOADS[name]
            # Wandb's is an enumeration.
            asked = getattr(callback, "_log_model", None) or os.environ.get(variable, "")
            if str(getattr(asked, "value", asked)).lower() not in NOT_ASKED:
                raise GroundingValueError(
                    f"{variable}={getattr(asked, 'value', asked)} has {name} upload {what}. Unset it, and upload the "
                    "adapter: trainer.save_model(folder) writes it and nothing else, and push_to_hub=True publishes it."
                )


def check_model(model: Any) -> None:
    """Raise where a model cannot be trained: it is not a `GroundedModel`, or its adapter is frozen."""
    if not isinstance(model, GroundedModel):
        raise GroundingTypeError(f"GroundingTrainer trains a GroundedModel, got {type(model).__name__}.")
    if not any(parameter.requires_grad for parameter in model.adapter.parameters()):
        raise GroundingStateError("The adapter is frozen; load it with is_trainable=True to train it further.")


def no_predictions(trainer: Any, *args: Any, **options: Any) -> NoReturn:
    """Raise GroundingTypeError: `Trainer.predict` returns the logits of a dataset, which never exist as a whole."""
    raise GroundingTypeError(
        "GroundingTrainer has no predict: logits of whole batches are never computed. Use trainer.evaluate(rows), "
        "model.generate, or model.embed_text and model.embed_images."
    )


def freeze_others(model: GroundedModel) -> None:
    """Freeze whatever is trainable and not saved with the active adapter: what no checkpoint holds is not trained."""
    kept = {id(parameter) for parameter in _saved_parameters(model)}
    foreign = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in kept]
    if not foreign:
        return
    for name in foreign:
        model.get_parameter(name).requires_grad_(False)
    logger.warning(
        "%d parameters outside the adapter were trainable (%s, ...) and are frozen: they are not saved with it. To "
        "train a PEFT adapter of the LM too, ground the PeftModel with GroundingConfig(train_lm_adapter=True).",
        len(foreign),
        foreign[0],
    )


def check_optimizer(optimizer: Optimizer, model: GroundedModel) -> None:
    """Raise GroundingValueError where an optimizer would change anything but what is saved with the adapter."""
    saved = {id(parameter) for parameter in _saved_parameters(model)}
    optimized = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    foreign = [parameter for parameter in optimized if id(parameter) not in saved]
    if foreign:
        raise GroundingValueError(
            f"The optimizer has {len(foreign)} tensors of {len(optimized)} that do not belong to the adapter, such as "
            f"one of shape {tuple(foreign[0].shape)}; a change of these would not be saved. Build it from "
            "model.adapter.parameters()."
        )


def check_resumed_optimizer(optimizer: Optimizer, checkpoint: str | os.PathLike[str]) -> None:
    """Raise GroundingValueError where a checkpoint's optimizer state is one of another optimizer."""
    path = Path(checkpoint) / OPTIMIZER_NAME
    if not path.is_file():
        return
    saved = _shape(torch.load(path, map_location="cpu", weights_only=True)["param_groups"])
    current = _shape(optimizer.state_dict()["param_groups"])
    if saved != current:
        raise GroundingValueError(
            f"{os.fspath(checkpoint)} was written with another optimizer: its groups are {saved}, and this run's are "
            f"{current}. Use the checkpoint's optim and projector_learning_rate, or another output folder; "
            "GroundedModel.from_pretrained(..., is_trainable=True) takes its adapter without its optimizer."
        )


def _shape(groups: list[dict[str, Any]]) -> list[tuple[int, list[str]]]:
    """Return for each group how many tensors it has, and which settings besides those of a scheduler."""
    return [(len(group["params"]), sorted({*group} - {"params", "initial_lr"})) for group in groups]


def _saved_parameters(model: GroundedModel) -> list[nn.Parameter]:
    beside = trained_parameters(model.lm) if model.config.train_lm_adapter else []
    return [*model.adapter.parameters(), *beside]
