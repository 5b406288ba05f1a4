"""`GroundingTrainer`: transformers' `Trainer` over the losses; checkpoints hold the adapter, never the LM."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from visual_ground.errors import GroundingStateError, GroundingTypeError, GroundingValueError
from visual_ground.evaluation.base import Evaluator, as_evaluators, run_evaluators
from visual_ground.model import GroundedModel
from visual_ground.training import checkpoints, setup
from visual_ground.training.adapter_checkpoints import AdapterCheckpoints
from visual_ground.training.arguments import GroundingTrainingArguments
from visual_ground.training.callback import GroundingCallback
from visual_ground.training.contact_sheet import log_sheet, sheet_entries
from visual_ground.training.data.columns import Skipped
from visual_ground.training.data.examples import ExampleDataset
from visual_ground.training.data.streams import ExampleStream
from visual_ground.training.distributed import (
    gathered_outside_layers,
    optimizer_unsharded,
    shard_base_only,
    stream_loader,
)
from visual_ground.training.fast_paths import prefixes_not_kept, refill_prefix_cache
from visual_ground.training.finite_check import FiniteCheck
from visual_ground.training.losses.objective import GroundingLoss, GroundingObjective, Loss
from visual_ground.training.meters import Meters, set_tensorboard_folder
from visual_ground.training.validation import Validation


class GroundingTrainer(Trainer):
    """Trains the adapter of a grounded model on image-caption pairs.

    The features of all images are computed first and kept on disk. After each step `[RET]` is scaled back to the mean
    norm. A loss or gradient that is not finite stops the training before it changes the adapter. A killed run resumes
    with `train(resume_from_checkpoint=True)`, and ends with the same adapter as if it had not been killed.

    Args:
        model: the grounded model; its adapter is trained in place.
        args: the settings.
        train_dataset: rows with images and captions: a sequence, or a `datasets.IterableDataset`.
        eval_dataset: a sequence of such rows, for the loss, recalls, and a contact sheet.
        evaluator: one `visual_ground.evaluation.Evaluator` or several, run at each evaluation. Their metrics are logged
            as `eval_<name>_<metric>`, and `metric_for_best_model="<name>"` stands for an evaluator's primary metric.
        loss: a `losses.objective.Loss`, called with the objective and a batch; `FromageLoss` with the scales of
            `args` where None. It has no trainable parameters of its own.
        options: `callbacks`, `optimizers` and other arguments of `Trainer`.

    Raises:
        GroundingTypeError: not a `GroundedModel`, a dataset, an evaluator or a loss; or captions that are no strings.
        GroundingValueError: a dataset that is empty, lacks a column, has only empty captions or too many unreadable
            images, or is smaller than a batch; a batch of one.
        GroundingStateError: an adapter that was loaded without `is_trainable=True`.

    Example:
        >>> trainer = GroundingTrainer(model, args, train_dataset=pairs, eval_dataset=others)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    # Narrower than Trainer's own types.
    args: GroundingTrainingArguments
    model: GroundingObjective
    train_dataset: ExampleDataset | ExampleStream | None
    eval_dataset: ExampleDataset | None

    def __init__(
        self,
        model: GroundedModel,
        args: GroundingTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        evaluator: Evaluator | Sequence[Evaluator] | None = None,
        loss: Loss | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(model, GroundedModel):
            raise GroundingTypeError(f"GroundingTrainer trains a GroundedModel, got {type(model).__name__}.")
        if not any(parameter.requires_grad for parameter in model.adapter.parameters()):
            raise GroundingStateError("The adapter is frozen; load it with is_trainable=True to train it further.")
        args = GroundingTrainingArguments() if args is None else args
        self.grounded, self.evaluators = model, as_evaluators(evaluator)
        objective = setup.build_objective(model, args, loss)
        self._preparation = setup.data_preparation(model, args)
        train = None if train_dataset is None else setup.training_examples(train_dataset, self._preparation)
        evaluated = None if eval_dataset is None else setup.evaluation_examples(eval_dataset, self._preparation)
        setup.check_batches(train, args)
        self._sampler = setup.build_sampler(train, args)
        self.meters, self.skipped = Meters(model.adapter), Skipped(args.max_skipped)
        self._finite_check, self._checkpoints = FiniteCheck(), AdapterCheckpoints(model, args)
        # Trainer refuses to evaluate without a dataset, but an evaluator brings its own.
        placeholder: Any = () if self.evaluators and evaluated is None else evaluated
        super().__init__(objective, args, setup.build_collator(model, args), train, placeholder, **options)
        self.eval_dataset = evaluated
        shard_base_only(self.accelerator, objective)
        self.loss_is_scaled_for_ga = False  # The objective returns the mean of a batch, as Trainer has to know.
        self.add_callback(GroundingCallback(model.adapter, self.meters, self._finite_check, self._sampler))
        set_tensorboard_folder(self.callback_handler, os.path.join(str(args.output_dir), "logs"))

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Return the optimizer; the layer from image features to image tokens may have its own learning rate."""
        is_new = self.optimizer is None
        optimizer: Optimizer = super().create_optimizer(model)
        if is_new:
            setup.set_projector_learning_rate(optimizer, self.grounded.adapter, self.args.projector_learning_rate)
        return optimizer

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the batches of this process."""
        if not isinstance(self.train_dataset, ExampleStream):
            return super().get_train_dataloader()
        return stream_loader(self.train_dataset, self.data_collator, self._train_batch_size, self.args)

    def train(
        self,
        resume_from_checkpoint: str | os.PathLike[str] | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, as `Trainer.train` does; a new adapter first gets start values from the training pairs.

        Args:
            resume_from_checkpoint: a complete checkpoint; True takes the run's last complete one, and starts from the
                beginning where there is none, so that the same command both starts and resumes a run.
            trial: as in `Trainer.train`.
            ignore_keys_for_eval: not used.

        Raises:
            GroundingFileError: the checkpoint is not complete, or none could be written.
            GroundingValueError: the checkpoint of another LM or of other settings; a loss that is not finite.
        """
        checkpoint = self._checkpoints.find(resume_from_checkpoint)
        steps_done = 0 if checkpoint is None else checkpoints.global_step(checkpoint)
        if checkpoint is not None and 0 < self.args.max_steps <= steps_done:
            self._checkpoints.load_adapter(checkpoint)
            return TrainOutput(steps_done, 0.0, {})
        if self.train_dataset is not None:
            setup.initialize(self.model, self.train_dataset, self.args, self._collated, self.is_fsdp_enabled)
            if self._sampler is not None and steps_done and self.args.prefix_cache_gb > 0:
                batches, loader = steps_done * self.args.gradient_accumulation_steps, self.get_train_dataloader()
                refill_prefix_cache(self.model.prefixes, loader, self._sampler, batches, self._prepare_inputs)
        setup.record_settings(self.grounded, self.args, self.train_dataset)
        return super().train(None if checkpoint is None else os.fspath(checkpoint), trial, ignore_keys_for_eval)

    def _collated(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return a batch on the run's device."""
        return self._prepare_inputs(self.data_collator([dict(example) for example in examples]))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **options: Any) -> Tensor:
        """Run one batch up to its gradients; `GroundingCallback` checks them before the optimizer's step."""
        self.skipped.seen += len(inputs["rows"])
        for name in inputs.pop("skipped", ()):
            self.skipped.add(name)
        loss = super().training_step(model, inputs, *args, **options)
        self._finite_check.add(loss, inputs["rows"])
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch, with the other outputs of the objective where `return_outputs`."""
        outputs: GroundingLoss = model(**inputs)
        if model.training:
            self.meters.count(inputs, outputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Log, and add what the steps since the last training log did."""
        if "loss" in logs:
            logs |= self.meters.read()
        super().log(logs, *args, **options)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Run the evaluators; on a dataset, compute loss, recalls and `[RET]` rate, and draw a contact sheet.

        Args:
            eval_dataset: rows; the trainer's own where None.
            ignore_keys: not used.
            metric_key_prefix: put before the name of each metric.

        Raises:
            GroundingValueError: neither a dataset nor an evaluator; or a loss that is not finite.
        """
        examples = self.eval_dataset
        if eval_dataset is not None:
            examples = setup.evaluation_examples(eval_dataset, self._preparation)
        if examples is None and not self.evaluators:
            raise GroundingValueError("There is nothing to evaluate on; pass eval_dataset= or evaluator=.")
        self.model.eval()
        results: dict[str, float] = {}
        if examples is not None:
            results |= self._validate(examples, metric_key_prefix)
        with gathered_outside_layers(self.model):
            results |= run_evaluators(self.grounded, self.evaluators)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in results.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.meters.start()
        return metrics

    def _validate(self, examples: ExampleDataset, name: str) -> dict[str, float]:
        validation = Validation(self.grounded, examples, self.args.per_device_eval_batch_size, self.accelerator)
        with gathered_outside_layers(self.model):
            results = validation.recalls()
            # One process writes the contact sheet, but all processes of a sharded LM must run it.
            if self.args.num_logged_examples and (self.args.should_save or self.is_fsdp_enabled):
                entries = sheet_entries(self.grounded, examples, self.args.num_logged_examples)
                if self.args.should_save:
                    log_sheet(entries, str(self.args.output_dir), name, self.state.global_step, self.callback_handler)
        with prefixes_not_kept(self.model):
            results["loss"] = validation.loss(lambda batch: self.compute_loss(self.model, self._collated(batch)))
        return results

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter; every process has all of it, so nothing is gathered."""
        self._checkpoints.save_adapter(output_dir)

    # The following are private methods of Trainer, which has no public ones for what they do.

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        return self._sampler  # The order is a function of seed and epoch alone, so that a restart needs no saved state.

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # A checkpoint is many files, and counts once all are on disk; callbacks hear of it only where nothing failed.
        with self._checkpoints.writing(self.state, self.accelerator.wait_for_everyone), optimizer_unsharded(self):
            super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Trainer would load what `_save_checkpoint` wrote without FSDP as a state that FSDP had sharded.
        with optimizer_unsharded(self):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Trainer would look for the weights of the whole objective, the LM's among them.
        self._checkpoints.load_adapter(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        # Likewise.
        self._checkpoints.load_adapter(str(self.state.best_model_checkpoint))
