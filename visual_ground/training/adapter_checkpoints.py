"""A `Trainer` whose checkpoints hold the adapter and are whole or do not count; the LM is in none of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from visual_ground.model import GroundedModel
from visual_ground.training import checkpoints


class CheckpointsOfAdapter(Trainer):
    """Saves and loads what is trained of `grounded`, in sealed checkpoints.

    Attributes:
        grounded: the model whose adapter is trained.
    """

    grounded: GroundedModel

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run, writes, limit = Path(self._get_output_dir(trial)), self.args.should_save, self.args.save_total_limit
        folder = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if writes:
            checkpoints.remove(folder)
        self.accelerator.wait_for_everyone()
        # Old checkpoints are removed when the new one is sealed, and not before.
        self.args.save_total_limit = None
        with checkpoints.removed_unless_written(folder, writes):
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.save_total_limit = limit
            self.accelerator.wait_for_everyone()
            if writes:
                checkpoints.seal(folder)
        if writes:
            checkpoints.remove_surplus(run, limit, self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write the adapter, and the arguments; never the LM."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        self.grounded.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter; no wrapper is asked, for every process has it whole."""
        self._save(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._nothing_sharded():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self._nothing_sharded():
            super()._load_optimizer_and_scheduler(checkpoint)

    @contextmanager
    def _nothing_sharded(self) -> Iterator[None]:
        """FSDP shards nothing that has an optimizer's state, which is then written as without FSDP."""
        enabled, self.is_fsdp_enabled = self.is_fsdp_enabled, False
        try:
            yield
        finally:
            self.is_fsdp_enabled = enabled

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.grounded.active.load_weights(resume_from_checkpoint, self.grounded.lm)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))
