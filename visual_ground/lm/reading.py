"""`LMReading`: the results of one run of the LM at chosen positions."""

from __future__ import annotations

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
