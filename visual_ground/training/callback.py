"""`GroundingCallback`: what a run does at each step and epoch besides what transformers' `Trainer` does."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from visual_ground.adapter.adapter import Adapter
from visual_ground.training.data.sampler import EpochSampler
from visual_ground.training.finite_check import FiniteCheck
from visual_ground.training.meters import Meters

# The epoch is a sum of fractions: after a restart in the middle of one it may be a little below a whole number.
EPOCH_ROUNDING = 1e-6


class GroundingCallback(TrainerCallback):
    """Checks gradients, scales `[RET]` back to the mean norm after each backward pass, and counts epochs.

    Args:
        adapter: the adapter that is trained.
        meters: start anew with the training.
        finite_check: has the losses of the step's batches.
        sampler: is told the epoch; None for a stream, which counts its epochs by itself.
    """

    def __init__(
        self, adapter: Adapter, meters: Meters, finite_check: FiniteCheck, sampler: EpochSampler | None
    ) -> None:
        self.adapter, self.meters, self.finite_check, self.sampler = adapter, meters, finite_check, sampler

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start counting, and forget the batches of a step that was interrupted."""
        self.meters.start()
        self.finite_check.start()

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Tell the sampler the epoch."""
        if self.sampler is not None:
            self.sampler.set_epoch(int((state.epoch or 0) + EPOCH_ROUNDING))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Raise before the optimizer reads a gradient that is not finite."""
        self.finite_check.run((parameter.grad for parameter in self.adapter.parameters()), state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Scale `[RET]` back to the mean norm, as the official implementation does."""
        self.adapter.renormalise_ret()

    # The official implementation does so after each batch of an accumulated step too.
    on_substep_end = on_step_end
