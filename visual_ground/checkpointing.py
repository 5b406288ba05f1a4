"""Gradient checkpointing of a frozen LM: its layers' states are computed again on the way back, and not kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from visual_ground.errors import GroundingValueError


class Checkpointing:
    """Checkpoints a frozen LM's layers in the runs that need it, and leaves nothing behind.

    transformers checkpoints only layers in training mode, where their dropout is on. Here a layer is in training mode
    while it decides, and in evaluation mode while it computes; after each run it is what it was.

    Args:
        lm: the causal LM.
    """

    def __init__(self, lm: nn.Module) -> None:
        self.lm, self.enabled = lm, False

    def enable(self) -> None:
        """Checkpoint from now on.

        Raises:
            GroundingValueError: an LM whose layers cannot.
        """
        if not self._layers():
            raise GroundingValueError(
                f"{type(self.lm).__name__} has no layers that transformers can checkpoint. Train without "
                "gradient_checkpointing."
            )
        self.enabled = True

    def disable(self) -> None:
        """Stop."""
        self.enabled = False

    def _layers(self) -> list[nn.Module]:
        return [layer for layer in self.lm.modules() if isinstance(layer, GradientCheckpointingLayer)]

    @contextlib.contextmanager
    def during(self, use_cache: bool | None) -> Iterator[None]:
        """Checkpoint the runs inside the block, where gradients are wanted and no cache is."""
        if not self.enabled or use_cache is not False or not torch.is_grad_enabled():
            yield
            return
        names = ("gradient_checkpointing", "_gradient_checkpointing_func", "training")
        layers = self._layers()
        before = [{name: vars(layer)[name] for name in names if name in vars(layer)} for layer in layers]
        for layer in layers:
            vars(layer).update(zip(names, (True, _checkpoint, True), strict=True))
        try:
            yield
        finally:
            for layer, values in zip(layers, before, strict=True):
                for name in names:
                    vars(layer).pop(name, None)
                vars(layer).update(values)


def _checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """Run a layer's forward, a partial whose first argument is the layer, so that its states are not kept."""
    layer = function.args[0]  # type: ignore[attr-defined]

    def frozen(*inputs: Any) -> Any:
        before, layer.training = layer.training, False
        try:
            return function(*inputs)
        finally:
            layer.training = before

    return checkpoint(frozen, *args, use_reentrant=False)
