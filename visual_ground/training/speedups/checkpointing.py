"""Gradient checkpointing for a frozen LM: its layers are computed again in the backward pass instead of kept.

transformers' own switch works in training mode only, and in training mode a frozen LM would drop out activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from visual_ground.errors import GroundingStateError
from visual_ground.training.speedups.attention import recomputed_alike


class LayerCheckpoints:
    """Checkpoints the layers of an LM inside `active()` blocks, once enabled; outside them the LM is as it was."""

    def __init__(self, lm: nn.Module) -> None:
        self._lm = lm
        self._options: dict[str, Any] | None = None

    def enable(self, options: Mapping[str, Any] | None = None) -> None:
        """Switch checkpointing on.

        Args:
            options: for `torch.utils.checkpoint.checkpoint`; always not reentrant.

        Raises:
            GroundingStateError: an LM whose layers are not known to transformers as such.
        """
        if not self._layers():
            raise GroundingStateError(
                f"{type(self._lm).__name__} has no layers that transformers can checkpoint. Leave gradient "
                "checkpointing off, and use mini_batch_size to bound the memory."
            )
        settings = {"preserve_rng_state": False, "context_fn": recomputed_alike}
        self._options = {**settings, **(options or {}), "use_reentrant": False}

    def _layers(self) -> list[nn.Module]:
        return [module for module in self._lm.modules() if isinstance(module, GradientCheckpointingLayer)]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Checkpoint every layer's forward inside the block."""
        if self._options is None or not torch.is_grad_enabled():
            yield
            return
        layers = self._layers()
        before = [layer.__dict__.get("forward") for layer in layers]
        for layer in layers:
            layer.forward = partial(self._checkpointed, layer.forward)
        try:
            yield
        finally:
            for layer, forward in zip(layers, before, strict=True):
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward

    def _checkpointed(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, **(self._options or {}), **kwargs)
