"""`RunEvaluation`: what a run measures at each evaluation, on its datasets and by its evaluators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers.trainer_callback import CallbackHandler

from visual_ground.evaluation.base import Evaluator, run_evaluators
from visual_ground.model import GroundedModel
from visual_ground.training.arguments import GroundingTrainingArguments
from visual_ground.training.contact_sheet import log_sheet, sheet_entries
from visual_ground.training.data.examples import ExampleDataset
from visual_ground.training.distributed import gathered_outside_layers
from visual_ground.training.fast_paths import prefixes_not_kept
from visual_ground.training.losses.objective import GroundingObjective
from visual_ground.training.validation import Validation

Examples = ExampleDataset | dict[str, ExampleDataset] | None


@dataclass(frozen=True)
class RunEvaluation:
    """Computes loss, recalls and `[RET]` rate of datasets, draws contact sheets, and runs evaluators.

    Args:
        model: the grounded model.
        evaluators: run once, whatever the number of datasets.
        args: the run's settings.
        accelerator: the trainer's.
        callbacks: hear of the contact sheets.
        loss_of: the loss of a batch of examples.
    """

    model: GroundedModel
    evaluators: Sequence[Evaluator]
    args: GroundingTrainingArguments
    accelerator: Accelerator
    callbacks: CallbackHandler
    loss_of: Callable[[Sequence[Mapping[str, Any]]], Tensor]

    @torch.no_grad()
    def run(self, objective: GroundingObjective, examples: Examples, prefix: str, step: int) -> dict[str, float]:
        """Return the metrics by name, each with the prefix and, where it has one, its dataset's name before it."""
        objective.eval()
        metrics: dict[str, float] = {}
        datasets = examples if isinstance(examples, dict) else {} if examples is None else {"": examples}
        for name, dataset in datasets.items():
            start = f"{prefix}_{name}" if name else prefix
            results = self._validate(objective, dataset, start, step)
            metrics |= {f"{start}_{metric}": value for metric, value in results.items()}
        with gathered_outside_layers(objective):
            results = run_evaluators(self.model, self.evaluators)
        return {**metrics, **{f"{prefix}_{metric}": value for metric, value in results.items()}}

    def _validate(
        self, objective: GroundingObjective, examples: ExampleDataset, name: str, step: int
    ) -> dict[str, float]:
        validation = Validation(
            self.model, examples, self.args.per_device_eval_batch_size, self.accelerator, self.args.shows_progress
        )
        with gathered_outside_layers(objective):
            results = validation.recalls()
            # One process writes the contact sheet, but all processes of a sharded LM must run it.
            sharded = getattr(self.accelerator.state, "fsdp_plugin", None) is not None
            if self.args.num_logged_examples and (self.args.should_save or sharded):
                entries = sheet_entries(self.model, examples, self.args.num_logged_examples)
                if self.args.should_save:
                    log_sheet(entries, str(self.args.output_dir), name, step, self.callbacks)
        with prefixes_not_kept(objective):
            results["loss"] = validation.loss(self.loss_of)
        return results
