"""Reading the LM: the results of one run at chosen positions, and further ids that a step of `generate` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visual_ground.lm.key_values import shortened

# Arguments of a step of `generate` that grow with its ids. An LM that takes anything else for each id is left alone.
PER_ID = ("input_ids", "attention_mask", "position_ids", "cache_position")
CACHES, SWITCHES = ("cache", "past_key_values"), ("use_cache", "return_dict")


@dataclass(frozen=True)
class LMReading:
    """The results of one run of the LM at r chosen positions.

    Args:
        head_input: (r, h), what the output head read.
        states: one (r, width) for each layer that was asked for.
        logits: (r, columns), or fewer positions if `max_logits` was given.
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


def last_positions(ids: Tensor) -> Tensor:
    """Return the flat position (b,) of the last id of each row of ids (b, s)."""
    return torch.arange(1, len(ids) + 1, device=ids.device) * ids.shape[1] - 1


def log_likelihoods(logits: Tensor, targets: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the log-likelihood of each of n texts, summed over its ids, in nats, (n,).

    Args:
        logits: (r, columns), what predicts each id, text after text.
        targets: (r,) the ids.
        lengths: how many of them each text has; r in all.
    """
    targets = targets.to(logits.device)
    values = torch.log_softmax(logits.float(), -1).gather(-1, targets[:, None])[:, 0]
    return torch.stack([part.sum() for part in torch.split(values, list(lengths))])


@dataclass(eq=False)
class ExtraIds:
    """Further ids, read in the same forward as a step of `generate`.

    The step's own id does not attend to them, and they are taken out of the cache afterwards.

    A forward of one id takes about as long as one of several, because all weights are read once for either.

    Args:
        cache: the keys and values (1, heads, p, width) that the step continues from, in plain layers.
        ids: (1, 1 + w), the step's own id and then the others.
        positions: (1, 1 + w), of each in its sequence.
        mask: (1, 1, 1 + w, p + 1 + w), added to the attention scores.

    Attributes:
        states: (1 + w, h), what the output head would read at each, once the step has been taken.
    """

    cache: Any
    ids: Tensor
    positions: Tensor
    mask: Tensor
    states: Tensor | None = None

    def join(self, options: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the arguments of the step's forward with the other ids in them; None if it is another forward."""
        own, cache = options.get("input_ids"), next((options[name] for name in CACHES if name in options), None)
        if cache is not self.cache or own is None or not torch.equal(own, self.ids[:, :1]):
            return None
        known = (*PER_ID, *CACHES, *SWITCHES, "logits_to_keep")
        if any(value is not None and value is not False for name, value in options.items() if name not in known):
            return None
        changed: dict[str, Any] = {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": self.positions}
        if options.get("cache_position") is not None:
            start = self.mask.shape[-1] - self.ids.shape[1]
            changed["cache_position"] = torch.arange(start, self.mask.shape[-1], device=self.ids.device)
        if "logits_to_keep" in options:  # Which would leave the LM's head only the last of them.
            changed["logits_to_keep"] = 0
        return {**options, **changed}

    def part(self, head_input: Tensor | None) -> None:
        """Note the states, and take what the other ids left out of the cache.

        Args:
            head_input: (1, 1 + w, h); any other shape is not understood, and gives no states.
        """
        count = self.ids.shape[1]
        if head_input is not None and head_input.shape[:-1] == (1, count):
            self.states = head_input[0]
        shortened(self.cache, self.mask.shape[-1] - count + 1)
