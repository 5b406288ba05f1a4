"""A copy of the keys and values of a running `generate`, so that the LM can read ids that are not in its answer."""

from __future__ import annotations

from torch import Tensor
from transformers import DynamicCache

from visual_ground.lm.frozen_lm import FrozenLM
from visual_ground.lm.hook_context import context_of
from visual_ground.lm.key_values import copy_of, plain_layers


def copy_of_running_cache(frozen_lm: FrozenLM, length: int, rows: Tensor) -> DynamicCache | None:
    """Copy some rows of the cache of the LM's innermost run; another run may add to the copy without harm.

    Args:
        frozen_lm: the LM, inside its `generate`.
        length: how many positions it should hold.
        rows: (r,) long, which sequences of the batch.

    Returns:
        A cache, or None where the LM keeps anything but plain keys and values of these positions, such as a state
        space, a static cache or nothing.
    """
    context = context_of(frozen_lm.virtual_tokens)
    if context is None or plain_layers(context.cache, length) is None:
        return None
    return copy_of(context.cache, lambda tensor: tensor if len(rows) == len(tensor) else tensor[rows.to(tensor.device)])
