"""One step of ours, with the optimizer, clipping and renormalisation that `GroundingTrainer` has."""

from __future__ import annotations

import torch
from shapes import batch

from visual_ground import GroundedModel
from visual_ground.training import GroundingObjective
from visual_ground.training.captions import Shortcuts
from visual_ground.training.prefixes import PrefixStore
from visual_ground.training.shortcuts import choose_prefixes, find_shortcuts


class Lean:
    """Trains a grounded model's adapter.

    Args:
        model: the grounded model.
        shortcuts: how; found out where None.
        prefixes: "none" runs whole captions, "run" their prefixes without gradient, "kept" keeps these.
        autocast: compute the LM in bfloat16.
    """

    def __init__(
        self,
        model: GroundedModel,
        shortcuts: Shortcuts | None = None,
        prefixes: str = "run",
        autocast: bool = False,
    ) -> None:
        some = {
            part: {name: tensor.to(model.adapter.logit_scale.device) for name, tensor in value.items()}
            for part, value in batch(model, 4).items()
            if part in ("captioning", "retrieval")
        }
        ways = find_shortcuts(model, some["captioning"]) if shortcuts is None else shortcuts
        store: PrefixStore | None = None
        if prefixes != "none":
            store = choose_prefixes(model, some["retrieval"], 2**40 if prefixes == "kept" else 0, ways.packed)
            assert store is not None
        self.objective = GroundingObjective(model, prefixes=store, shortcuts=ways).train()
        self.trained = list(model.adapter.parameters())
        self.optimizer = torch.optim.AdamW(self.trained, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.0)
        self.model, self.ways, self.autocast = model, ways, autocast

    def step(self, inputs: dict) -> float:
        """Run one whole step; return its loss."""
        self.optimizer.zero_grad()
        device = self.model.adapter.logit_scale.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.autocast):
            loss = self.objective(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.model.adapter.renormalise_ret()
        return float(loss.detach())
