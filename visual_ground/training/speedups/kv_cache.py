"""Keys and values of a prompt prefix that many sequences share: computed once, then given to the LM as its cache."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from visual_ground.errors import GroundingStateError
from visual_ground.lm.key_values import cache_of, keeps_all, plain_layers
from visual_ground.model import GroundedModel

# Prefixes whose keys and values are held; the least recently computed go first. Chats give every question its own.
MAX_PREFIXES = 64

# For each layer of the LM, keys and values (b, heads, p, width).
KeysValues = list[tuple[Tensor, Tensor]]


class SharedPrefixCache:
    """Runs prompt prefixes, none of which has a trained token, once each, and keeps their keys and values."""

    def __init__(self, model: GroundedModel) -> None:
        self._model = model
        self._kept: OrderedDict[tuple[int, ...], KeysValues] = OrderedDict()

    @torch.no_grad()
    def get(self, ids: tuple[int, ...]) -> KeysValues | None:
        """Return each layer's keys and values (1, heads, p, width) of p ids, or None if there are no ids."""
        if not ids:
            return None
        if ids not in self._kept:
            tensor = torch.tensor([ids], device=self._model.frozen_lm.device)
            last = torch.full((1,), len(ids) - 1, device=tensor.device)
            reading = self._model.frozen_lm.read(tensor, torch.ones_like(tensor), last, use_cache=True)
            self._kept[ids] = keys_values_of(reading.output, len(ids))
            if len(self._kept) > MAX_PREFIXES:
                self._kept.popitem(last=False)
        return self._kept[ids]


def keys_values_of(output: Any, length: int) -> KeysValues:
    """Return each layer's keys and values (b, heads, length, width), of every position that was run.

    Args:
        output: what the LM returned, run with `use_cache=True`.
        length: how many positions were run.

    Raises:
        GroundingStateError: an LM that keeps something else, such as a state space, or fewer positions.
    """
    layers = plain_layers(cache_of(output), length)
    if layers is None:
        raise GroundingStateError(f"{type(cache_of(output)).__name__} is not one plain key-value cache per layer.")
    if not keeps_all(cache_of(output), length):
        raise GroundingStateError(f"A layer keeps fewer than the {length} positions that were run.")
    return [(layer.keys, layer.values) for layer in layers]


def expanded(layers: KeysValues, count: int) -> KeysValues:
    """Return keys and values (1, ...) as (count, ...), without copying them."""
    return [(keys.expand(count, -1, -1, -1), values.expand(count, -1, -1, -1)) for keys, values in layers]


class _FixedLayer(DynamicLayer):
    """A layer's keys and values that a run reads without adding to them, so that it can be run again.

    Checkpointed layers run a second time in the backward pass, and would find their own keys in a cache that grows.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the kept and the new ones, joined."""
        assert self.keys is not None and self.values is not None, "fixed_cache sets them"
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)


def fixed_cache(layers: KeysValues) -> DynamicCache:
    """Return a cache of keys and values (b, heads, p, width) that stays as it is."""
    cache = DynamicCache()
    for keys, values in layers:
        layer = _FixedLayer()  # type: ignore[no-untyped-call]  # transformers' DynamicLayer is untyped
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def growing_cache(layers: KeysValues) -> DynamicCache:
    """Return a cache of keys and values (b, heads, p, width) to which a run adds its own."""
    cache = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys, values, number)
    return cache
