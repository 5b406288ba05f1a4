"""The LM alone in mixed precision, without its weights being converted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

COPIES_BYTES = 2**31


@contextmanager
def autocast_lm(lm: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Run the LM's forward under `torch.autocast`, and nothing around it.

    The weights of frozen linear layers are cast once, as far as the copies fit into `COPIES_BYTES`; autocast would cast
    them in each forward pass, which takes as long as reading some hundred tokens.

    Args:
        lm: the LM.
        dtype: bfloat16 or float16; None leaves the LM as it is.
    """
    if dtype is None:
        yield
        return
    running: list[torch.autocast] = []

    def enter(module: nn.Module, args: Any) -> None:
        running.append(torch.autocast(next(lm.parameters()).device.type, dtype))
        running[-1].__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if running:  # Not if a hook before `enter` raised.
            running.pop().__exit__(None, None, None)

    # A run that ends early, at a layer that is read, raises.
    handles = lm.register_forward_pre_hook(enter), lm.register_forward_hook(leave, always_call=True)
    layers = _castable(lm, dtype)
    try:
        for layer in layers:
            layer.forward = _with_copies(layer, dtype)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            layer.__dict__.pop("forward", None)  # Copies that find no memory leave some layers as they were.


def _castable(lm: nn.Module, dtype: torch.dtype) -> list[Any]:
    """Return the linear layers of which copies are kept: plain, frozen and in float32."""
    found, room = list[Any](), COPIES_BYTES
    for layer in lm.modules():
        if type(layer) is not nn.Linear or "forward" in layer.__dict__:
            continue
        weight = layer.weight
        room -= weight.numel() * dtype.itemsize
        if weight.dtype == torch.float32 and not weight.requires_grad and room >= 0:
            found.append(layer)
    return found


def _with_copies(layer: Any, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return the layer's forward, with weights that are cast beforehand."""
    original: Callable[[Tensor], Tensor] = layer.forward
    weight = layer.weight.detach().to(dtype)
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)

    def forward(inputs: Tensor) -> Tensor:
        # Who calls the output head by itself gets what the LM's own type gives.
        if not torch.is_autocast_enabled(inputs.device.type):
            return original(inputs)
        return nn.functional.linear(inputs, weight, bias)

    return forward
