"""`LMReading`: the results of one run of the LM at chosen positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class LMReading:
    """The results of one run of the LM at r chosen positions.

    Args:
        head_input: (r, h), what the output head read.
        states: one (r, width) for each layer that was asked for.
        logits: (r, v + 1), or fewer positions where `max_logits` was given.
        output: the LM's own output, with its cache.
    """

    head_input: Tensor
    states: list[Tensor]
    logits: Tensor
    output: Any


def states_at(output: Any, head_input: Tensor, layers: Sequence[int], positions: Tensor) -> list[Tensor]:
    """Return the hidden states of layers at flat positions, one (r, width) for each.

    Args:
        output: the LM's own.
        head_input: (r, h), what its head read at these positions, which is layer -1.
        layers: as in `GroundingConfig.text_layers`.
        positions: (r,) long.
    """
    hidden = [None if layer == -1 else output.hidden_states[layer] for layer in layers]
    return [head_input if h is None else h.flatten(0, 1).index_select(0, positions.to(h.device)) for h in hidden]
