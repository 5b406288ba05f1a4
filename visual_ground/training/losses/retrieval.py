"""The text-retrieval pass: the likelihood of captions with `[RET]` after them, and their vectors.

A vector is read at `[RET]`, or at the last word of the retrieval prompt where there is one, which then stands in its
place: the LM predicts `[RET]` there, but reads the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from visual_ground.model import GroundedModel
from visual_ground.training.data.sequences import TokenSequence, with_retrieval_prompt
from visual_ground.training.losses.captioning import LossSum
from visual_ground.training.speedups.packing import pad_in_order, read


@dataclass(frozen=True)
class RetrievalOutput:
    """The cross entropy of the captions' labels, and the captions' vectors (b, q)."""

    text: LossSum
    vectors: Tensor

    @property
    def loss(self) -> Tensor:
        """The mean cross entropy of the labels."""
        return self.text.mean

    @classmethod
    def joined(cls, parts: Sequence[RetrievalOutput]) -> RetrievalOutput:
        """Return the output for the sequences of all parts, in order."""
        text = LossSum(torch.stack([part.text.total for part in parts]).sum(), sum(part.text.count for part in parts))
        return cls(text, torch.cat([part.vectors for part in parts]))


@dataclass(frozen=True)
class CaptionLikelihoods:
    """What the text loss of several captions depends on besides `[RET]`'s output embedding.

    Args:
        head_input: (labels, h), what the head read before each label.
        log_normaliser: (labels,), over all columns but `[RET]`'s.
        label_logits: (labels - captions,), of the captions' own tokens.
        ends: (captions,), the indices of `[RET]` among the labels.
    """

    head_input: Tensor
    log_normaliser: Tensor
    label_logits: Tensor
    ends: Tensor

    @classmethod
    def joined(cls, parts: Sequence[CaptionLikelihoods]) -> CaptionLikelihoods:
        """Return the captions of all parts, in order."""
        offsets = torch.tensor([0, *[len(part.log_normaliser) for part in parts]]).cumsum(0)
        return cls(
            torch.cat([part.head_input for part in parts]),
            torch.cat([part.log_normaliser for part in parts]),
            torch.cat([part.label_logits for part in parts]),
            torch.cat([part.ends + offset.to(part.ends) for part, offset in zip(parts, offsets, strict=False)]),
        )

    def loss(self, ret_output: Tensor) -> LossSum:
        """Return the summed cross entropy of captions' tokens and `[RET]`s, with `[RET]`'s output embedding (h,)."""
        with torch.autocast(ret_output.device.type, enabled=False):
            ret_logits = self.head_input.to(ret_output) @ ret_output
        normaliser = torch.logaddexp(self.log_normaliser.to(ret_logits), ret_logits)
        predicted = self.label_logits.sum().to(ret_logits) + ret_logits.index_select(0, self.ends).sum()
        return LossSum(normaliser.sum() - predicted, len(normaliser))


def plain_retrieval(
    model: GroundedModel, sequences: Sequence[TokenSequence], image_tokens: Tensor | None = None
) -> RetrievalOutput:
    """Run whole captions, each ending with `[RET]`, with gradient; `PrefixCache.run` computes the same for less.

    Args:
        model: the grounded model.
        sequences: the captions, requests or prompts.
        image_tokens: (m * k, d), of the images in them, in order.
    """
    batch = pad_in_order(model, [with_retrieval_prompt(model.processor, sequence) for sequence in sequences])
    count = len(batch.targets)
    positions = torch.cat([batch.label_positions, batch.last_positions])
    reading = read(model, batch, positions, image_tokens, layers=model.config.text_layers)
    logits = reading.logits[:count].float()
    total = F.cross_entropy(logits, batch.targets.to(logits.device), reduction="sum")
    vectors = model.active.embed_states([states[count:] for states in reading.states])
    return RetrievalOutput(LossSum(total, count), vectors)


def plain_states(
    model: GroundedModel, sequences: Sequence[TokenSequence], image_tokens: Tensor | None = None
) -> list[Tensor]:
    """Run whole captions, each ending with `[RET]`; return what `PrefixCache.states` returns."""
    batch = pad_in_order(model, [with_retrieval_prompt(model.processor, sequence) for sequence in sequences])
    options: dict[str, Any] = {"layers": model.config.text_layers, "max_logits": 1}
    return read(model, batch, batch.last_positions, image_tokens, **options).states
