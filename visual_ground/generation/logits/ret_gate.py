"""Whether an answer may have pictures, which is read where it begins."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor

from visual_ground.adapter.attached import AttachedAdapter
from visual_ground.lm.frozen_lm import FrozenLM
from visual_ground.lm.reading import last_positions


class RetGate(LogitsProcessor):
    """Lowers `[RET]`'s logit in the answers to what asks for no picture.

    What the LM is about to say tells where a picture belongs, and where an answer begins it tells whether one was asked
    for; at the end of "An elephant is dangerous." the LM has nearly forgotten that.

    Args:
        frozen_lm: the LM, inside its `generate`.
        attached: the active adapter.
        ids, mask: (b, s), of the prompts, padded on the left; those that open no turn of a chat are left as they are.
    """

    def __init__(self, frozen_lm: FrozenLM, attached: AttachedAdapter, ids: Tensor, mask: Tensor) -> None:
        self.frozen_lm, self.attached, self.ids, self.mask = frozen_lm, attached, ids, mask
        opens = [attached.processor.opens_turn(row[kept.bool()].tolist()) for row, kept in zip(ids, mask, strict=True)]
        self._opens = torch.tensor(opens)
        self._lowered: Tensor | None = None

    def read_prompts(self, image_tokens: Tensor | None) -> None:
        """Read the prompts in a run of their own, where another one comes between the first step and its processors.

        Args:
            image_tokens: (n * k, d), of the prompts' images.
        """
        ids = self.ids
        states = self.frozen_lm.hidden_states(ids, self.mask, last_positions(ids), image_tokens=image_tokens)
        self._keep(states[0])

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (b, columns) with `[RET]`'s lowered, by as much in all steps of an answer."""
        ret_token_id, context = self.attached.processor.ret_token_id, self.frozen_lm.virtual_tokens.context
        if scores.shape[-1] <= ret_token_id:  # Its adapter is disabled.
            return scores
        if self._lowered is None and context is not None and context.head_input is not None:
            # Speculative decoding reads tokens behind the prompt in the same step.
            behind = max(0, context.shape[1] - self.ids.shape[1])
            self._keep(context.head_input[:, -1 - behind])
        if self._lowered is None:
            return scores
        scores = scores.clone()
        # Beams and further answers of a prompt stand side by side.
        scores[:, ret_token_id] += self._lowered.repeat_interleave(len(scores) // len(self._lowered)).to(scores)
        return scores

    def _keep(self, states: Tensor) -> None:
        lowered = self.attached.adapter.ret_gate(states)
        self._lowered = lowered * self._opens.to(lowered.device).repeat_interleave(len(lowered) // len(self._opens))
