"""Keys and values of prompts of different lengths; what all of them begin with is read once."""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from visual_ground.lm.frozen_lm import FrozenLM
from visual_ground.lm.key_values import cache_of, copy_of, keeps_all, shortened
from visual_ground.lm.reading import last_positions
from visual_ground.model import GroundedModel

# Positions of prompts that are read at once.
READ_AT_ONCE = 1024


def read_beginnings(
    model: GroundedModel, prompts: Sequence[tuple[int, ...]], ids: Tensor, mask: Tensor, image_tokens: Tensor | None
) -> Any:
    """Return the keys and values of all columns but the last of prompts (b, s) that are padded on the left.

    A few prompts of about the same length are read together: less is padding, and what the layers compute stays in a
    processor's caches.

    Returns:
        A cache; None if the LM keeps something else.
    """
    frozen_lm, width = model.frozen_lm, ids.shape[1]
    if width < 2:
        return None
    shared, at_once, caches = _shared_beginning(frozen_lm, prompts), max(1, READ_AT_ONCE // width), []
    for i in range(0, len(prompts), at_once):
        longest = max(2, *map(len, prompts[i : i + at_once]))
        columns = slice(width - longest, width - 1)
        cache = _read(frozen_lm, ids[i : i + at_once, columns], mask[i : i + at_once, columns], image_tokens, shared)
        if not keeps_all(cache, longest - 1):
            return None
        caches.append(cache)
    return _joined(caches)


def _read(
    frozen_lm: FrozenLM, ids: Tensor, mask: Tensor, image_tokens: Tensor | None, shared: DynamicCache | None
) -> Any:
    """Return what the LM keeps of ids (b, s), padded on the left, given what it kept of those that all begin with."""
    count, cache = 0, None
    if shared is not None:
        # Each row has its own padding, so a short one takes fewer of the shared ids, and reads the rest of them anew.
        count = min(shared.get_seq_length(), ids.shape[1] - 1)
        columns = torch.arange(count, device=ids.device) - (mask == 0).sum(1, keepdim=True)
        columns = columns.clamp_min(0)  # What is read as padding is masked.
        cache = copy_of(shared, lambda tensor: tensor[0][:, columns.to(tensor.device)].transpose(0, 1))
        cache = shortened(cache, count)
    ids = ids[:, count:]
    last = last_positions(ids)
    reading = frozen_lm.read(ids, mask, last, image_tokens, max_logits=1, use_cache=True, cache=cache)
    return cache_of(reading.output)


def _joined(caches: Sequence[DynamicCache]) -> DynamicCache:
    """Return caches of plain layers as one, the shorter ones padded on the left."""
    longest = max(caches, key=lambda cache: int(cache.get_seq_length()))
    length, joined = longest.get_seq_length(), copy_of(longest, lambda tensor: tensor)
    layers: list[Any] = joined.layers
    for layer, *parts in zip(layers, *(cache.layers for cache in caches), strict=True):
        for name in ("keys", "values"):
            tensors = [getattr(part, name) for part in parts]
            equally_long = [nn.functional.pad(one, (0, 0, length - one.shape[-2], 0)) for one in tensors]
            setattr(layer, name, torch.cat(equally_long))
    return joined


def _shared_beginning(frozen_lm: FrozenLM, prompts: Sequence[tuple[int, ...]]) -> DynamicCache | None:
    """Return what the LM keeps, (1, ...), of the ids that all prompts begin with, or None if it cannot be shared."""
    shared = os.path.commonprefix(list(prompts))
    # Up to the first picture, which is another in each prompt.
    shared = shared[: next((i for i, token in enumerate(shared) if token < 0), None)]
    if not shared or len(prompts) < 2:
        return None
    ids = torch.tensor([shared], device=frozen_lm.device)
    last = torch.tensor([len(shared) - 1], device=frozen_lm.device)
    cache: DynamicCache = cache_of(frozen_lm.read(ids, torch.ones_like(ids), last, use_cache=True).output)
    return cache if keeps_all(cache, len(shared)) else None
