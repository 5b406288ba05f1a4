"""One step of ours, with the optimizer, clipping and renormalisation that `GroundingTrainer` has."""

from __future__ import annotations

import torch
from shapes import batch

from visual_ground import GroundedModel
from visual_ground.training.losses.cached_retrieval import PrefixCache
from visual_ground.training.losses.captioning import ComputePlan
from visual_ground.training.losses.compute_plan import choose_compute_plan, choose_prefix_cache
from visual_ground.training.losses.objective import GroundingObjective


class Lean:
    """Trains a grounded model's adapter.

    Args:
        model: the grounded model.
        plan: how; found out where None.
        prefixes: "none" runs whole captions, "run" their prefixes without gradient, "kept" keeps these.
        autocast: compute the LM in bfloat16.
    """

    def __init__(
        self,
        model: GroundedModel,
        plan: ComputePlan | None = None,
        prefixes: str = "run",
        autocast: bool = False,
    ) -> None:
        tried = batch(model, 4)
        plan = choose_compute_plan(model, tried["captioning"]) if plan is None else plan
        store: PrefixCache | None = None
        if prefixes != "none":
            store = choose_prefix_cache(model, tried["retrieval"], 2**40 if prefixes == "kept" else 0, plan.packed)
            assert store is not None
        self.objective = GroundingObjective(model, prefixes=store, plan=plan).train()
        self.trained = list(model.adapter.parameters())
        self.optimizer = torch.optim.AdamW(self.trained, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.0)
        self.model, self.autocast = model, autocast

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
