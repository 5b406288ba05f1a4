"""Recognises a cache of plain keys and values, and copies it so that another run can continue from it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# Layers whose `update` puts new tensors in the place of the old ones and never writes into these, so that a copy of the
# layer can share them. A sliding window keeps the last positions only.
PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


def cache_of(output: Any) -> Any:
    """Return the cache in an LM's output, None if there is none."""
    # transformers 5.24 renamed what older ones call past_key_values.
    return getattr(output, "cache" if hasattr(output, "cache") else "past_key_values", None)


def plain_layers(cache: Any, length: int) -> list[Any] | None:
    """Return the layers of a cache of keys and values (b, heads, positions, width), one each for every layer of the LM.

    Args:
        cache: as from `cache_of`.
        length: how many positions were run.

    Returns:
        The layers; None if the LM keeps something else of these positions, such as a state space, a static or
        quantised cache, or nothing.
    """
    layers = getattr(cache, "layers", None)
    if type(cache) is not DynamicCache or not layers or any(type(layer) not in PLAIN_LAYERS for layer in layers):
        return None
    if any(layer.get_seq_length() != length or layer.keys.dim() != 4 for layer in layers):
        return None
    return list(layers)


def keeps_all(cache: Any, length: int) -> bool:
    """Whether a cache has plain keys and values of so many positions; a sliding window may be shorter than that."""
    layers = plain_layers(cache, length)
    return layers is not None and all(layer.keys.shape[-2] == length for layer in layers)


def copy_of(cache: Any, change: Callable[[Tensor], Tensor]) -> DynamicCache:
    """Return a copy of a cache of plain layers, which a run may add to without harm to the original.

    Args:
        cache: one whose `plain_layers` are not None.
        change: maps keys and values (b, ...) to those of the copy, such as `lambda tensor: tensor[rows]`.
    """
    copied: DynamicCache = copy.copy(cache)
    layers: list[Any] = [copy.copy(layer) for layer in cache.layers]
    copied.layers = layers
    for layer in layers:
        layer.keys, layer.values = change(layer.keys), change(layer.values)
    return copied


def shortened(cache: DynamicCache, kept: int) -> DynamicCache:
    """Keep only the first `kept` positions of a cache of plain layers, which hold all positions that were run."""
    layers: list[Any] = cache.layers
    for layer in layers:
        layer.keys, layer.values = layer.keys[:, :, :kept], layer.values[:, :, :kept]
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = kept
    return cache
