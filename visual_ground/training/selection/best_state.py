"""`BestState`: a transformers callback that scores the adapter during a run, keeps its best state, and stops early."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from visual_ground.lm.base.peft import trained_parameters
from visual_ground.model import GroundedModel
from visual_ground.storage.tensors import read_tensors, write_json, write_tensors
from visual_ground.training.selection.held_out import HeldOut

logger = logging.getLogger(__name__)

# How often a run is scored, at even distances, the start apart.
NUM_CHECKS = 10
STATE_FILE, TENSORS_FILE = "best_state.json", "best_state.safetensors"


@dataclass
class Part:
    """Tensors that are kept together, because their scores depend on nothing else that is trained.

    Args:
        tensors: those of the model, by name.
        scores: the names of the scores that count. A state is better than another where one of them is larger and none
            smaller.
        best: the best state.
        found: its scores; empty before the first.
        step: after how many steps it was.
    """

    tensors: dict[str, Tensor]
    scores: tuple[str, ...]
    best: dict[str, Tensor] = field(default_factory=dict)
    found: dict[str, float] = field(default_factory=dict)
    step: int = 0

    def offer(self, scores: Mapping[str, float], step: int) -> bool:
        """Keep the tensors as they are now if they are better, or the first; return whether they are."""
        own = {name: scores[name] for name in self.scores}
        differences = [own[name] - self.found.get(name, -math.inf) for name in own]
        # Written so that a score that is no number is never better.
        if not (all(one >= 0 for one in differences) and any(one > 0 for one in differences)):
            return False
        self.found, self.step = own, step
        self.best = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        return True

    @torch.no_grad()
    def restore(self) -> None:
        """Give the model the best state."""
        for name, tensor in self.best.items():
            self.tensors[name].copy_(tensor)


class BestState(TrainerCallback):
    """Scores the start and ten states of a run on held-out examples; the best one is restored in the end.

    Image tokens and the retrieval layers are kept apart, each by its own score, unless one depends on the other.

    Args:
        model: the grounded model.
        held_out: scores it; None: nothing is scored, kept or restored.
        patience: scores in a row without a better one, after which the run ends.
        log: takes the scores.
        gathered: given what the run trains, a block in which all of the LM can be run.
    """

    def __init__(
        self,
        model: GroundedModel,
        held_out: HeldOut | None,
        patience: int,
        log: Callable[[dict[str, float]], None],
        gathered: Callable[[nn.Module], AbstractContextManager[None]],
    ) -> None:
        self.held_out, self.patience, self.log, self.gathered = held_out, patience, log, gathered
        self.parts = {} if held_out is None else parts_of(model, held_out)
        self.waited = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        """Score the start, unless a run that goes on has brought its best state."""
        if self.held_out is not None and not all(part.found for part in self.parts.values()):
            self._score(state.global_step, event["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Score the state after each tenth of the run; end it where nothing has become better for long."""
        every = max(1, math.ceil(state.max_steps / NUM_CHECKS))
        if self.held_out is None or (state.global_step % every and state.global_step < state.max_steps):
            return
        self.waited = 0 if self._score(state.global_step, event["model"]) else self.waited + 1
        if self.waited >= self.patience:
            logger.info("Nothing became better for %d scores; the run ends at step %d.", self.waited, state.global_step)
            control.should_training_stop = True

    def _score(self, step: int, objective: nn.Module) -> bool:
        """Score the state now; return whether any part is better than its best."""
        assert self.held_out is not None, "callers ask"
        with self.gathered(objective):
            scores = self.held_out.scores()
        # Processes round differently, and must keep the same state.
        shared: list[Any] = broadcast_object_list([scores])
        self.log({f"held_out_{name}": round(value, 4) for name, value in shared[0].items()})
        return any([part.offer(shared[0], step) for part in self.parts.values()])

    def restore(self) -> None:
        """Give the model its best state."""
        for name, part in self.parts.items():
            part.restore()
            if part.found and part.step == 0:
                logger.warning("No step made %s better on held-out groups, so it is as at the start.", name)
            elif part.found:
                logger.info("The state of %s is that after step %d.", name, part.step)

    def save(self, folder: Path | None) -> None:
        """Write the best state beside a checkpoint's files; None: another process does it."""
        if self.parts and folder is not None:
            tensors = {name: tensor for part in self.parts.values() for name, tensor in part.best.items()}
            write_tensors(folder / TENSORS_FILE, tensors)
            parts = {name: {"found": part.found, "step": part.step} for name, part in self.parts.items()}
            write_json(folder / STATE_FILE, {"waited": self.waited, "parts": parts})

    def load(self, folder: Path | None) -> None:
        """Take the best state of a checkpoint, where there is one, and it has one of the same parts."""
        if folder is None or not (folder / STATE_FILE).is_file():
            return
        saved = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        if {name: set(one["found"]) for name, one in saved["parts"].items()} != {
            name: set(part.scores) for name, part in self.parts.items()
        }:
            return
        expected = {name: tensor.detach() for part in self.parts.values() for name, tensor in part.tensors.items()}
        tensors, self.waited = read_tensors(folder / TENSORS_FILE, expected), saved["waited"]
        for name, part in self.parts.items():
            part.found, part.step = saved["parts"][name]["found"], saved["parts"][name]["step"]
            part.best = {key: tensors[key].to(tensor.device) for key, tensor in part.tensors.items()}

    @property
    def is_over(self) -> bool:
        """Whether the run has ended early."""
        return bool(self.parts) and self.waited >= self.patience


def parts_of(model: GroundedModel, held_out: HeldOut) -> dict[str, Part]:
    """Return what is kept together, by name."""
    tensors: dict[str, Tensor] = dict(model.adapter.named_parameters())
    tunes_lm = model.config.train_lm_adapter
    if tunes_lm or held_out.reads_images_to_retrieve:
        beside = trained_parameters(model.lm) if tunes_lm else []
        tensors |= {f"lm.{number}": tensor for number, tensor in enumerate(beside)}
        return {"the adapter": Part(tensors, held_out.names)}
    of_images = {name: tensor for name, tensor in tensors.items() if name.startswith("image_projection.")}
    others = {name: tensor for name, tensor in tensors.items() if name not in of_images}
    parts = {"retrieval": others, "captioning": of_images}
    names = {"retrieval": "retrieval", "captioning": "the image tokens"}
    return {names[score]: Part(parts[score], (score,)) for score in held_out.names}
