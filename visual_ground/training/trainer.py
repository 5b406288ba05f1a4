"""`GroundingTrainer`: transformers' `Trainer` over the losses; checkpoints hold the adapter, never the LM."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from visual_ground.errors import GroundingStateError, GroundingTypeError, GroundingValueError
from visual_ground.evaluation import retrieval_recall
from visual_ground.features import FeatureCache
from visual_ground.model import GroundedModel
from visual_ground.saving import WEIGHTS_FILE, load_tensors_into, resolve
from visual_ground.training.examples import ExampleCollator, ExampleDataset, check_columns
from visual_ground.training.losses import GroundingLoss, GroundingObjective, choose_prefixes

logger = logging.getLogger(__name__)

# The arguments that an adapter's card shows.
RECORDED = (
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


@dataclass
class GroundingTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments` with the published optimizer settings, and what grounding needs besides.

    Args:
        caption_loss_scale: weight of the captioning loss.
        retrieval_loss_scale: weight of the text-retrieval and contrastive losses.
        concat_captions_prob: how often two captions are read as one sequence when captioning.
        captioning_fraction: the part of each batch that is captioned.
        end_captions: whether a caption's end is to be predicted when captioning.
        max_caption_length: ids of a caption with its `[RET]`; longer ones are cut.
        feature_cache: folder of the frozen features; "features" in the output folder where None.
        cache_features: False runs the vision encoder in every step.
        prefix_cache_gb: memory for what the LM computes before each caption's `[RET]`, kept across epochs.
    """

    output_dir: str | None = field(default="grounded")
    learning_rate: float = field(default=1e-3)
    adam_beta2: float = field(default=0.95)
    weight_decay: float = field(default=0.0)
    max_grad_norm: float = field(default=1.0)
    per_device_train_batch_size: int = field(default=64)
    per_device_eval_batch_size: int = field(default=64)
    remove_unused_columns: bool = field(default=False)
    dataloader_drop_last: bool = field(default=True)
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)
    report_to: str | list[str] | None = field(default="none")
    caption_loss_scale: float = field(default=1.0)
    retrieval_loss_scale: float = field(default=1.0)
    concat_captions_prob: float = field(default=0.5)
    captioning_fraction: float = field(default=1.0)
    end_captions: bool = field(default=True)
    max_caption_length: int = field(default=24)
    feature_cache: str | None = field(default=None)
    cache_features: bool = field(default=True)
    prefix_cache_gb: float = field(default=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.concat_captions_prob <= 1 or not 0 < self.captioning_fraction <= 1:
            raise GroundingValueError("concat_captions_prob must be in [0, 1] and captioning_fraction in (0, 1].")
        if self.max_caption_length < 2 or self.prefix_cache_gb < 0:
            raise GroundingValueError("max_caption_length must be at least 2, prefix_cache_gb must not be negative.")


class GroundingTrainer(Trainer):
    """Trains the adapter of a grounded model on image-caption pairs.

    Features of all images are computed first and kept on disk; `[RET]` is scaled back to the mean norm after each
    step; a loss or gradient that is not finite stops the training before it reaches the adapter.

    Args:
        model: the grounded model; its adapter is trained in place.
        args: the settings.
        train_dataset: rows with `image` and `caption`, see `ExampleDataset`; or one, whose features are taken as given.
        eval_dataset: likewise.
        options: callbacks, optimizers and the like, for `Trainer`.

    Raises:
        GroundingTypeError: not a `GroundedModel`.
        GroundingValueError: a dataset that is empty or lacks a column.
        GroundingStateError: an adapter that was loaded without `is_trainable=True`.

    Example:
        >>> trainer = GroundingTrainer(model, args, train_dataset=pairs, eval_dataset=others)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: GroundedModel,
        args: GroundingTrainingArguments | None = None,
        train_dataset: Sequence[Mapping[str, Any]] | None = None,
        eval_dataset: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(model, GroundedModel):
            raise GroundingTypeError(f"GroundingTrainer trains a GroundedModel, got {type(model).__name__}.")
        if not any(parameter.requires_grad for parameter in model.adapter.parameters()):
            raise GroundingStateError("The adapter is frozen; load it with is_trainable=True to train it further.")
        args = GroundingTrainingArguments() if args is None else args
        self.grounded, self._progress = model, not args.disable_tqdm
        self._parts: dict[str, list[float]] = {}
        self._cache = self._open_cache(model, args)
        train = None if train_dataset is None else self._examples(train_dataset, sample=True)
        evaluated = None if eval_dataset is None else self._examples(eval_dataset, sample=False)
        objective = GroundingObjective(model, args.caption_loss_scale, args.retrieval_loss_scale)
        collator = ExampleCollator(
            model, args.max_caption_length, args.concat_captions_prob, args.captioning_fraction, args.end_captions
        )
        super().__init__(objective, args, collator, train, evaluated, **options)
        self.loss_is_scaled_for_ga = False
        self.add_callback(_Renormalise(model))

    @staticmethod
    def _open_cache(model: GroundedModel, args: GroundingTrainingArguments) -> FeatureCache | None:
        if not args.cache_features:
            return None
        return FeatureCache(args.feature_cache or os.path.join(args.output_dir, "features"), model.vision)

    def _examples(self, rows: Sequence[Mapping[str, Any]], sample: bool) -> ExampleDataset:
        """Wrap a dataset's rows, with their images' features where these are cached."""
        if isinstance(rows, ExampleDataset):
            return rows
        check_columns(rows)
        if self._cache is None:
            return ExampleDataset(rows, groups=_groups(rows, None), sample=sample)
        images = [row["image"] if isinstance(row["image"], (list, tuple)) else [row["image"]] for row in rows]
        flat = self._cache.features([image for several in images for image in several], progress=self._progress)
        features = flat.split([len(several) for several in images])
        return ExampleDataset(rows, features, _groups(rows, features), sample)

    def train(self, *args: Any, **options: Any) -> Any:
        """Train, as `Trainer.train` does; a new adapter first learns the spread of the image features."""
        self._standardise()
        self._choose_prefixes()
        self.grounded.record_training(self._settings())
        return super().train(*args, **options)

    def _settings(self) -> dict[str, Any]:
        """Return what the adapter's card says of its training."""
        settings = {name: getattr(self.args, name) for name in RECORDED}
        pairs = len(self.train_dataset) if self.train_dataset is not None else 0
        return {"pairs": pairs, "library_version": version("visual-ground"), **settings}

    @torch.no_grad()
    def _standardise(self) -> None:
        adapter, examples = self.grounded.adapter, self.train_dataset
        fresh = not adapter.feature_mean.any() and bool((adapter.feature_std == 1).all())
        if examples is None or self.grounded.config.units != "lm" or not fresh:
            return
        if examples.features is not None:
            adapter.standardise_with(torch.cat(list(examples.features)))
            return
        some = [examples[i]["image"] for i in range(min(len(examples), 1024))]
        vision = self.grounded.vision
        batches = [vision(vision.preprocess(some[i : i + 32])) for i in range(0, len(some), 32)]
        adapter.standardise_with(torch.cat(batches))

    def _choose_prefixes(self) -> None:
        if self.train_dataset is None or self.model.prefixes is not None:
            return
        some = [self.train_dataset[i] for i in range(min(len(self.train_dataset), 8))]
        batch = self._prepare_inputs(self.data_collator(some)["retrieval"])
        self.model.prefixes = choose_prefixes(self.grounded, batch, int(self.args.prefix_cache_gb * 2**30))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """Return the loss of a batch, or raise where it is not finite."""
        losses: GroundingLoss = model(**inputs)
        if not bool(torch.isfinite(losses.loss)):
            raise GroundingValueError(f"The loss became {float(losses.loss.detach())} {self._where(inputs)}")
        for name, value in losses.items():
            if name != "loss" and model.training:
                self._parts.setdefault(name, []).append(float(value))
        return (losses.loss, losses) if return_outputs else losses.loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **options: Any) -> Tensor:
        """Run one step up to its gradients, or raise where these are not finite."""
        loss = super().training_step(model, inputs, *args, **options)
        gradients = [p.grad for p in self.grounded.adapter.parameters() if p.grad is not None]
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            raise GroundingValueError(f"A gradient is not finite {self._where(inputs)}")
        return loss

    def _where(self, inputs: Mapping[str, Any]) -> str:
        return (
            f"at step {self.state.global_step}, in the batch of rows {inputs['rows'].tolist()}. Training stopped "
            "before this step; the adapter and the last checkpoint are good. Lower the learning rate, or see the rows."
        )

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Log, with the means of the losses' parts since the last time."""
        if "loss" in logs:
            logs |= {name: round(sum(values) / len(values), 4) for name, values in self._parts.items() if values}
            logs["temperature"] = round(float((-self.grounded.adapter.logit_scale.detach()).exp()), 4)
            self._parts = {}
        super().log(logs, *args, **options)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the mean loss and the recalls over all pairs of a dataset, in both directions.

        Args:
            eval_dataset: rows; the trainer's own where None.
            ignore_keys: not used.
            metric_key_prefix: put before each name.
        """
        examples = self.eval_dataset if eval_dataset is None else self._examples(eval_dataset, sample=False)
        if examples is None:
            raise GroundingValueError("There is nothing to evaluate on; pass eval_dataset=.")
        self.model.eval()
        rows = [examples[i] for i in range(len(examples))]
        size, vision = self.args.per_device_eval_batch_size, self.grounded.vision
        features = [
            row["image_features"] if "image_features" in row else vision(vision.preprocess([row["image"]]))[0]
            for row in rows
        ]
        found = retrieval_recall(self.grounded, [row["caption"] for row in rows], torch.stack(features), size)
        metrics = {f"{metric_key_prefix}_{way}_{rank}": v for way, ranks in found.items() for rank, v in ranks.items()}
        starts = range(0, max(1, len(rows) - size + 1), size)
        batches = [self._prepare_inputs(self.data_collator(rows[i : i + size])) for i in starts]
        losses = [float(self.compute_loss(self.model, batch)) for batch in batches]
        metrics[f"{metric_key_prefix}_loss"] = sum(losses) / len(losses)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write the adapter, and the arguments; never the LM."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        self.grounded.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_tensors_into(self.grounded.adapter, resolve(resume_from_checkpoint, WEIGHTS_FILE))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class _Renormalise(TrainerCallback):
    """Scales `[RET]` back to the mean norm after each backward pass, as published."""

    def __init__(self, model: GroundedModel) -> None:
        self.model = model

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.model.adapter.renormalise_ret()

    on_substep_end = on_step_end


def _groups(rows: Sequence[Mapping[str, Any]], features: Sequence[Tensor] | None) -> list[int]:
    """Number the rows so that those with the same `group`, or else the same first image, have the same number."""
    numbers: dict[Any, int] = {}
    groups = []
    for i, row in enumerate(rows):
        key = row.get("group")
        if key is None:
            key = i if features is None else features[i][0].numpy().tobytes()
        groups.append(numbers.setdefault(key, len(numbers)))
    return groups
