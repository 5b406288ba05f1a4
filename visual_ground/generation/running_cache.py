"""A copy of the keys and values of a running `generate`, so that the LM can read ids that are not in its answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from visual_ground.lm.frozen_lm import FrozenLM
from visual_ground.lm.hook_context import context_of
from visual_ground.lm.key_values import copy_of, plain_layers, shortened


def copy_of_running_cache(frozen_lm: FrozenLM, length: int, places: Sequence[tuple[int, int]]) -> DynamicCache | None:
    """Copy some rows of the cache of the LM's innermost run; another run may add to the copy without harm.

    Args:
        frozen_lm: the LM, inside its `generate`.
        length: how many positions it should hold.
        places: sequences of the batch, each with how many of its first positions the copy holds. Those of the shorter
            ones stand at the right; what is on their left is to be masked.

    Returns:
        A cache, or None where the LM keeps anything but plain keys and values of these positions, such as a state
        space, a static cache or nothing.
    """
    context = context_of(frozen_lm.virtual_tokens)
    layers = None if context is None else plain_layers(context.cache, length)
    if context is None or layers is None:
        return None
    # A sliding window that has moved on has dropped what the last of the kept positions see.
    is_cut = any(kept < length for _, kept in places)
    if is_cut and any(layer.keys.shape[-2] != length for layer in layers):
        return None
    rows, most = [row for row, _ in places], max(kept for _, kept in places)

    def chosen(kv: Tensor) -> Tensor:
        if not is_cut:
            return kv if rows == list(range(len(kv))) else kv[torch.tensor(rows, device=kv.device)]
        copied = kv.new_zeros(len(places), kv.shape[1], most, kv.shape[3])
        for moved, (row, kept) in zip(copied, places, strict=True):
            moved[:, most - kept :] = kv[row, :, :kept]
        return copied

    copied = copy_of(context.cache, chosen)
    return shortened(copied, most) if most < length else copied
