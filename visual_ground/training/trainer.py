"""`GroundingTrainer`: transformers' `Trainer` over the losses; checkpoints hold the adapter, never the LM."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from visual_ground.errors import GroundingValueError
from visual_ground.evaluation.base import Evaluator, as_evaluators
from visual_ground.model import GroundedModel
from visual_ground.storage.hub import CARD_FILE
from visual_ground.training import checks, setup
from visual_ground.training.arguments import GroundingTrainingArguments
from visual_ground.training.callback import GroundingCallback
from visual_ground.training.data.examples import ExampleDataset
from visual_ground.training.data.skipped import Skipped
from visual_ground.training.data.streams import ExampleStream
from visual_ground.training.distributed import optimizer_unsharded, shard_base_only, stream_loader
from visual_ground.training.evaluating import Examples, RunEvaluation
from visual_ground.training.fast_paths import refill_prefix_cache
from visual_ground.training.finite_check import FiniteCheck
from visual_ground.training.losses.objective import GroundingLoss, GroundingObjective, Loss
from visual_ground.training.meters import Meters, set_tensorboard_folder
from visual_ground.training.saving import checkpoints
from visual_ground.training.saving.adapter_checkpoints import AdapterCheckpoints
from visual_ground.training.saving.publishing import Publisher, record_settings


class GroundingTrainer(Trainer):
    """Trains the adapter of a grounded model on image-caption pairs.

    Image features are computed first and kept on disk. A loss or gradient that is not finite stops the run before it
    changes the adapter. The result is the best state on held-out groups (`args.held_out`), the start among them. A
    killed run resumes with `train(resume_from_checkpoint=True)`, and ends as if it had not been killed.

    Args:
        model: the grounded model; its adapter is trained in place.
        args: the settings.
        train_dataset: rows with images and captions: a sequence, or a `datasets.IterableDataset`.
        eval_dataset: a sequence of such rows, for the loss, recalls, and a contact sheet; or several by name.
        evaluator: one `visual_ground.evaluation.Evaluator` or several, run at each evaluation. Their metrics are logged
            as `eval_<name>_<metric>`, and `metric_for_best_model="<name>"` stands for an evaluator's primary metric.
        loss: a `losses.objective.Loss`, called with the objective and a batch; `FromageLoss` with the scales of
            `args` where None. It has no trainable parameters of its own.
        options: `callbacks`, `optimizers` and `optimizer_cls_and_kwargs`, as for `Trainer`.

    Raises:
        GroundingTypeError: not a `GroundedModel`, a dataset, an evaluator or a loss; or captions that are no strings.
        GroundingValueError: a dataset that is empty, lacks a column, has only empty captions or too many unreadable
            images, or is smaller than a batch; a batch of one.
        GroundingStateError: an adapter that was loaded without `is_trainable=True`.
    """

    args: GroundingTrainingArguments
    model: GroundingObjective
    train_dataset: ExampleDataset | ExampleStream | None
    eval_dataset: Examples

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
        checks.check_model(model)
        args = checks.check_arguments(args, options)
        self.grounded, self.evaluators = model, as_evaluators(evaluator)
        objective = setup.build_objective(model, args, loss)
        self._preparation = setup.data_preparation(model, args)
        train, held_out = setup.training_data(model, train_dataset, self._preparation, args)
        evaluated = None if eval_dataset is None else setup.evaluation_examples(eval_dataset, self._preparation)
        setup.check_batches(train, args)
        self._sampler = setup.build_sampler(train, args)
        self.meters, self.skipped = Meters(model.adapter), Skipped(args.max_skipped)
        self._finite_check, self._checkpoints = FiniteCheck(), AdapterCheckpoints(model, args)
        self._publisher = Publisher(model, args)
        # Trainer refuses to evaluate without a dataset, but an evaluator brings its own.
        placeholder: Any = () if self.evaluators and evaluated is None else evaluated
        super().__init__(objective, args, setup.build_collator(model, args), train, placeholder, **options)
        self.eval_dataset = evaluated
        shard_base_only(self.accelerator, objective)
        self.loss_is_scaled_for_ga = False  # The objective returns the mean of a batch, as Trainer has to know.
        self.add_callback(GroundingCallback(model.adapter, self.meters, self._finite_check, self._sampler))
        self._best = setup.best_state(objective, held_out, args, self.log)
        self.add_callback(self._best)
        set_tensorboard_folder(self.callback_handler, os.path.join(str(args.output_dir), "logs"))

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Return the optimizer; some layers may have their own learning rates."""
        is_new, optimizer = self.optimizer is None, super().create_optimizer(model)
        if is_new:
            setup.set_learning_rates(optimizer, self.grounded.adapter, self.args)
        checks.check_optimizer(optimizer, self.grounded)
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

        `resume_from_checkpoint=True` takes the run's last complete checkpoint; where there is none, the run starts.

        Raises:
            GroundingFileError: the checkpoint is not complete, or none could be written.
            GroundingValueError: the checkpoint of another LM or of other settings; a loss that is not finite.
        """
        checkpoint = self._checkpoints.find(resume_from_checkpoint)
        steps_done = 0 if checkpoint is None else checkpoints.global_step(checkpoint)
        batches = steps_done * self.args.gradient_accumulation_steps
        checks.check_callbacks(self.callback_handler.callbacks)
        checks.freeze_others(self.grounded)
        self._best.load(checkpoint)
        if checkpoint is not None and (self._best.is_over or 0 < self.args.max_steps <= steps_done):
            self._checkpoints.load_adapter(checkpoint)
            output = TrainOutput(steps_done, 0.0, {})
        else:
            if self.train_dataset is not None:
                setup.initialize(self.model, self.train_dataset, self.args, self._collated, self.is_fsdp_enabled)
                loader_of, on_device = self.get_train_dataloader, self._prepare_inputs
                refill_prefix_cache(self.model.prefixes, loader_of, self._sampler, batches, on_device)
            record_settings(self.grounded, self.args, self.train_dataset)
            resumed = None if checkpoint is None else os.fspath(checkpoint)
            output = super().train(resumed, trial, ignore_keys_for_eval)
        self._best.restore()
        if self.args.push_to_hub:
            self.push_to_hub()
        return output

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

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Run the evaluators; on datasets, compute loss, recalls and `[RET]` rate, and draw a contact sheet."""
        examples = self.eval_dataset
        if eval_dataset is not None:
            examples = setup.evaluation_examples(eval_dataset, self._preparation)
        if examples is None and not self.evaluators:
            raise GroundingValueError("There is nothing to evaluate on; pass eval_dataset= or evaluator=.")
        parts = self.grounded, self.evaluators, self.args, self.accelerator, self.callback_handler
        evaluation = RunEvaluation(*parts, lambda batch: self.compute_loss(self.model, self._collated(batch)))
        metrics = evaluation.run(self.model, examples, metric_key_prefix, self.state.global_step)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.meters.start()
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter, and push it where `push_to_hub` is set; every process has all of it."""
        self._checkpoints.save_adapter(output_dir)
        if self.args.push_to_hub and not _internal_call and self.is_world_process_zero():
            self._publisher.push("Model save")

    def push_to_hub(  # type: ignore[override]  # Trainer's returns huggingface_hub's description of the commit
        self, commit_message: str | None = "End of training", blocking: bool = True, **options: Any
    ) -> str | None:
        """Commit what `GroundedModel.push_to_hub` commits, as blocking as that; `options` are as in `Trainer`."""
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        return self._publisher.push(commit_message, **options)

    def create_model_card(self, **card: Any) -> None:  # type: ignore[override]  # by keyword only
        """Write the adapter's card into the output folder; `card` is as in `Trainer.create_model_card`."""
        if self.is_world_process_zero():
            self._publisher.write_card(self._checkpoints.folder / CARD_FILE, **card)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository of `hub_model_id`, or of the output folder's name, where it does not exist."""
        if self.is_world_process_zero():
            self._publisher.open(token, private)

    predict = checks.no_predictions
    # The following are private methods of Trainer, which has no public ones for what they do.

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        return self._sampler  # The order is a function of seed and epoch alone, so that a restart needs no saved state.

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # A checkpoint is many files, and counts once all are on disk; callbacks hear of it only where nothing failed.
        written = self._checkpoints.writing(self.state, self.accelerator.wait_for_everyone)
        with written as folder, optimizer_unsharded(self):
            super()._save_checkpoint(model, trial)
            self._best.save(folder)
        self._publisher.push_checkpoint(self.state.global_step)

    # Trainer would upload the output folder; `_save_checkpoint` pushes the adapter, once it is sealed.
    def _push_from_checkpoint(self, checkpoint_folder: str) -> None: ...

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Trainer would load what `_save_checkpoint` wrote without FSDP as a state that FSDP had sharded.
        if checkpoint is not None and self.optimizer is not None:
            checks.check_resumed_optimizer(self.optimizer, checkpoint)
        with optimizer_unsharded(self):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Trainer would look for the weights of the whole objective, the LM's among them.
        self._checkpoints.load_adapter(resume_from_checkpoint)

    def _load_best_model(self) -> None:  # Likewise.
        self._checkpoints.load_adapter(str(self.state.best_model_checkpoint))
