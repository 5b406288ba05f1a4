"""`GroundingTrainer`: transformers' `Trainer` over the losses; checkpoints hold the adapter, never the LM."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from visual_ground.errors import GroundingStateError, GroundingTypeError, GroundingValueError
from visual_ground.model import GroundedModel
from visual_ground.training import checkpoints
from visual_ground.training import setup as starting
from visual_ground.training.adapter_checkpoints import CheckpointsOfAdapter
from visual_ground.training.arguments import GroundingTrainingArguments
from visual_ground.training.contact_sheet import draw_sheet, save_sheet, sheet_rows
from visual_ground.training.data.columns import Skipped, is_stream
from visual_ground.training.data.examples import ExampleCollator, ExampleDataset
from visual_ground.training.data.sampler import EpochSampler
from visual_ground.training.data.streams import ExampleStream, prepare_stream
from visual_ground.training.distributed import gathered_outside_layers, shard_base_only, share_adapter
from visual_ground.training.initialization.data_dependent import initialize_from_data
from visual_ground.training.losses.objective import FromageLoss, GroundingLoss, GroundingObjective
from visual_ground.training.meters import Meters, log_into, show_picture
from visual_ground.training.setup import (
    check_batches,
    first_examples,
    keeping_nothing,
    preparing_of,
    refill,
    set_compute_plan,
    set_row_rate,
    standardise,
)
from visual_ground.training.validation import Validation


class GroundingTrainer(CheckpointsOfAdapter):
    """Trains the adapter of a grounded model on image-caption pairs.

    Features of all images are computed first and kept on disk; `[RET]` is scaled back to the mean norm after each
    step; a loss or gradient that is not finite stops the training before it reaches the adapter. A run that was killed
    goes on with `train(resume_from_checkpoint=True)` and ends as if it had not been.

    Args:
        model: the grounded model; its adapter is trained in place.
        args: the settings.
        train_dataset: rows with images and captions, by number or as a `datasets.IterableDataset`.
        eval_dataset: rows by number.
        options: callbacks, optimizers and the like, for `Trainer`.

    Raises:
        GroundingTypeError: not a `GroundedModel`, not a dataset, or captions that are no strings.
        GroundingValueError: a dataset that is empty, lacks a column, has only empty captions or too many unreadable
            images, or has no whole batch; a batch of one.
        GroundingStateError: an adapter that was loaded without `is_trainable=True`.

    Example:
        >>> trainer = GroundingTrainer(model, args, train_dataset=pairs, eval_dataset=others)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: GroundedModel,
        args: GroundingTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **options: Any,
    ) -> None:
        if not isinstance(model, GroundedModel):
            raise GroundingTypeError(f"GroundingTrainer trains a GroundedModel, got {type(model).__name__}.")
        if not any(parameter.requires_grad for parameter in model.adapter.parameters()):
            raise GroundingStateError("The adapter is frozen; load it with is_trainable=True to train it further.")
        args = GroundingTrainingArguments() if args is None else args
        self.grounded, self.meters, self.skipped = model, Meters(model.adapter), Skipped(args.max_skipped)
        self._preparing, self.order = preparing_of(model, args), None
        train = None if train_dataset is None else self._examples(train_dataset, sample=True)
        evaluated = None if eval_dataset is None else self._examples(eval_dataset, sample=False)
        check_batches(train, args)
        objective = GroundingObjective(model, FromageLoss(args.caption_loss_scale, args.retrieval_loss_scale))
        collator = ExampleCollator(
            model,
            args.max_caption_length,
            args.concat_captions_prob,
            args.captioning_fraction,
            args.end_captions,
            args.sampling_seed,
        )
        super().__init__(objective, args, collator, train, evaluated, **options)
        shard_base_only(self.accelerator, self.model)
        self.loss_is_scaled_for_ga = False
        self.add_callback(_EachStep(self))
        log_into(self.callback_handler, os.path.join(args.output_dir, "logs"))

    def _examples(self, rows: Any, sample: bool) -> ExampleDataset | ExampleStream:
        if not is_stream(rows):
            return self._preparing.examples(rows, sample)
        if not sample:
            raise GroundingTypeError("A stream has no end to evaluate at; give eval_dataset=list(stream.take(500)).")
        return prepare_stream(rows, self._preparing)

    def create_optimizer(self, *args: Any, **options: Any) -> Optimizer:
        """Return the optimizer; the layer from images to input rows may have a learning rate of its own."""
        if self.optimizer is None:
            super().create_optimizer(*args, **options)
            set_row_rate(self.optimizer, self.grounded.adapter, self.args.projector_learning_rate)
        return self.optimizer

    # The order of the data is a function of seed and epoch, see `order`.

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        examples = self.train_dataset if train_dataset is None else train_dataset
        shuffle = self.args.train_sampling_strategy != "sequential"
        self.order = EpochSampler(len(examples), self.args.sampling_seed, shuffle)
        return self.order

    def get_train_dataloader(self) -> DataLoader:
        """Return the batches of this process; a stream is split already, so it is not split again."""
        if not isinstance(self.train_dataset, ExampleStream):
            return super().get_train_dataloader()
        loader = DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            drop_last=True,
        )
        return prepare_data_loader(loader, self.args.device, 1, 0, put_on_device=True, dispatch_batches=False)

    def train(self, resume_from_checkpoint: str | os.PathLike | bool | None = None, **options: Any) -> TrainOutput:
        """Train, as `Trainer.train` does; a new adapter first learns the spread of the image features.

        Args:
            resume_from_checkpoint: a whole checkpoint; True takes the run's last whole one, and starts where there is
                none, so that the same command both starts and goes on.
            options: as in `Trainer.train`.

        Raises:
            GroundingFileError: the checkpoint is not whole, or none could be written.
            GroundingValueError: the checkpoint of another base or other settings; a loss that is not finite.
        """
        checkpoint = checkpoints.choose(resume_from_checkpoint, self.args.output_dir)
        if checkpoint is not None:
            checkpoints.check_base(checkpoint, self.grounded)
            if 0 < self.args.max_steps <= checkpoints.global_step(checkpoint):
                self._load_from_checkpoint(os.fspath(checkpoint))
                return TrainOutput(checkpoints.global_step(checkpoint), 0.0, {})
        self._start(0 if checkpoint is None else checkpoints.global_step(checkpoint))
        starting.record_settings(self.grounded, self.args, self.train_dataset)
        return super().train(None if checkpoint is None else os.fspath(checkpoint), **options)

    def _start(self, steps_done: int) -> None:
        """Do what a run does once: the adapter's start values, and how captions' prefixes are run."""
        if self.train_dataset is None:
            return
        fresh = standardise(self.grounded, self.train_dataset)
        if self.model.prefixes is None:
            batch = self._prepare_inputs(self.data_collator(first_examples(self.train_dataset, 8)))
            set_compute_plan(self.model, batch, self.args, sharded=self.is_fsdp_enabled)
        if fresh and self.args.data_dependent_init:
            # A run that goes on does it too, though its checkpoint has other values: it leaves the same prefixes kept.
            collate = lambda rows: self._prepare_inputs(self.data_collator(rows))  # noqa: E731
            initialize_from_data(self.model, self.train_dataset, collate)
        share_adapter(self.grounded.adapter, self.args.world_size)
        kept = self.model.prefixes is not None and self.args.prefix_cache_gb > 0
        if kept and steps_done and isinstance(self.train_dataset, ExampleDataset):
            batches, loader = steps_done * self.args.gradient_accumulation_steps, self.get_train_dataloader()
            refill(self.model.prefixes, loader, self.order, batches, self._prepare_inputs)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self.skipped.seen += len(inputs.get("rows", ()))
        for name in inputs.pop("skipped", ()):
            self.skipped.add(name)
        return super()._prepare_inputs(inputs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """Return the loss of a batch, or raise where it is not finite."""
        losses: GroundingLoss = model(**inputs)
        if not bool(torch.isfinite(losses.loss)):
            raise GroundingValueError(f"The loss became {float(losses.loss.detach())} {self._where(inputs)}")
        if model.training:
            self.meters.count(inputs, losses)
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
        """Log, with what the steps since the last time did."""
        if "loss" in logs:
            logs |= self.meters.read()
        super().log(logs, *args, **options)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the mean loss, the recalls over all pairs both ways, and the `[RET]` rate; draw a contact sheet.

        Args:
            eval_dataset: rows; the trainer's own where None.
            ignore_keys: not used.
            metric_key_prefix: put before each name.
        """
        examples = self.eval_dataset if eval_dataset is None else self._examples(eval_dataset, sample=False)
        if examples is None:
            raise GroundingValueError("There is nothing to evaluate on; pass eval_dataset=.")
        self.model.eval()
        validation = Validation(self.grounded, examples, self.args.per_device_eval_batch_size, self.accelerator)
        with gathered_outside_layers(self.model):
            found = validation.recalls()
            self._draw(examples, metric_key_prefix)
        with keeping_nothing(self.model):
            collate = lambda rows: self._prepare_inputs(self.data_collator(rows))  # noqa: E731
            found["loss"] = validation.loss(lambda rows: self.compute_loss(self.model, collate(rows)))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.meters.start()
        return metrics

    def _draw(self, examples: ExampleDataset, name: str) -> None:
        step = self.state.global_step
        if not self.args.num_logged_examples or not (self.args.should_save or self.is_fsdp_enabled):
            return
        rows = sheet_rows(self.grounded, examples, self.args.num_logged_examples)
        if self.args.should_save:
            page = draw_sheet(rows, f"{name}, step {step}: caption, caption said (blue), images found for the caption")
            save_sheet(page, Path(self.args.output_dir) / "pictures" / f"{name}-{step:08d}.png")
            show_picture(self.callback_handler, f"{name}/pairs", np.asarray(page), step)


class _EachStep(TrainerCallback):
    """Tells the sampler its epoch, and scales `[RET]` back to the mean norm after each backward pass, as published."""

    def __init__(self, trainer: GroundingTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.meters.start()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if isinstance(self.trainer.train_dataset, ExampleDataset):
            # A run that goes on in the middle of an epoch has a broken number here.
            self.trainer.order.set_epoch(int((state.epoch or 0) + 1e-6))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.grounded.adapter.renormalise_ret()

    on_substep_end = on_step_end
