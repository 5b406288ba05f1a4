"""Reading the states of one of the LM's layers without running those above it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from visual_ground.lm.base.peft import base_model_of
from visual_ground.lm.frozen_lm import FrozenLM


@torch.no_grad()
def find_layers(frozen_lm: FrozenLM) -> list[nn.Module]:
    """Return the LM's layers in order, or none where they cannot be identified.

    They are the longest `nn.ModuleList` whose members all run, once and in order, and return states (b, s, width).
    """
    ids = torch.full((1, 2), frozen_lm.vocabulary.safe_id, device=frozen_lm.device)
    ran: list[nn.Module] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        states = _first(output)
        if isinstance(states, Tensor) and states.is_floating_point() and states.shape[:2] == ids.shape:
            ran.append(module)

    stacks = [part for part in base_model_of(frozen_lm.lm).modules() if isinstance(part, nn.ModuleList)]
    hooks = [layer.register_forward_hook(note) for stack in stacks for layer in stack]
    try:
        frozen_lm.forward(ids, torch.ones_like(ids), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    complete = [list(stack) for stack in stacks if [module for module in ran if module in set(stack)] == list(stack)]
    return max(complete, key=len, default=[])


def layer_states(frozen_lm: FrozenLM, layer: nn.Module, *args: Any, **options: Any) -> Tensor:
    """Return the states (b, s, width) that a layer returns in `FrozenLM.forward`; those above it do not run."""
    stop = layer.register_forward_hook(_stop)
    try:
        frozen_lm.forward(*args, **options)
    except _Reached as reached:
        return reached.states
    finally:
        stop.remove()
    raise AssertionError("find_layers ran this layer")


class _Reached(Exception):
    """Ends a run at the layer that is read, with its states."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def _stop(module: nn.Module, args: Any, output: Any) -> None:
    raise _Reached(_first(output))


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) and output else output
