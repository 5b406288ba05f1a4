"""A copy of the keys and values of a running `generate`, so that the LM can read ids that are not in its answer."""

from __future__ import annotations

from torch import Tensor
from transformers import DynamicCache

from visual_ground.lm.frozen_lm import FrozenLM
from visual_ground.lm.hook_context import context_of
from visual_ground.lm.key_values import copy_of, plain_layers, shortened


def copy_of_running_cache(frozen_lm: FrozenLM, length: int, rows: Tensor, kept: int) -> DynamicCache | None:
    """Copy some rows of the cache of the LM's innermost run; another run may add to the copy without harm.

    Args:
        frozen_lm: the LM, inside its `generate`.
        length: how many positions it should hold.
        rows: (r,) long, which sequences of the batch.
        kept: how many of these positions, from the first on, the copy holds.

    Returns:
        A cache, or None where the LM keeps anything but plain keys and values of these positions, such as a state
        space, a static cache or nothing.
    """
    context = context_of(frozen_lm.virtual_tokens)
    layers = None if context is None else plain_layers(context.cache, length)
    if context is None or layers is None:
        return None
    # A sliding window that has moved on has dropped what the last of the kept positions see.
    if kept < length and any(layer.keys.shape[-2] != length for layer in layers):
        return None
    copied = copy_of(context.cache, lambda kv: kv if len(rows) == len(kv) else kv[rows.to(kv.device)])
    return copied if kept == length else shortened(copied, kept)
