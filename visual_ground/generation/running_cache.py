"""A copy of the keys and values of a running `generate`, so that the LM can read ids that are not in its answer."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from visual_ground.lm.frozen_lm import FrozenLM
from visual_ground.lm.hook_context import context_of

# Layers whose `update` puts new tensors in the place of the old ones and never writes into these, so that a copy of the
# layer can share them.
_COPYABLE = (DynamicLayer, DynamicSlidingWindowLayer)


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
    cache: Any = None if context is None else context.cache
    layers = getattr(cache, "layers", None)
    if type(cache) is not DynamicCache or not layers or any(type(layer) not in _COPYABLE for layer in layers):
        return None
    if any(layer.get_seq_length() != length or layer.keys.dim() != 4 for layer in layers):
        return None
    # A sliding window that has moved on has dropped the positions that would be the last ones' neighbours.
    if kept < length and any(layer.keys.shape[-2] != length for layer in layers):
        return None
    copied = copy.copy(cache)
    copied.layers = [_copy(layer, rows, kept) for layer in layers]
    return copied


def _copy(layer: Any, rows: Tensor, kept: int) -> Any:
    copied = copy.copy(layer)
    if len(rows) < len(layer.keys):
        own = rows.to(layer.keys.device)
        copied.keys, copied.values = layer.keys[own], layer.values[own]
    if kept < layer.get_seq_length():
        copied.keys, copied.values = copied.keys[:, :, :kept], copied.values[:, :, :kept]
        if isinstance(layer, DynamicSlidingWindowLayer):
            copied.cumulative_length = kept
    return copied
