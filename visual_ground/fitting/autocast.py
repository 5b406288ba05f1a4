"""The LM alone in mixed precision, without its weights being converted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def autocast_lm(lm: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Run the LM's forward under `torch.autocast`, and nothing around it.

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
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
