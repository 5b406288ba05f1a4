"""The text-retrieval pass: captions in, how likely their words and `[RET]` are, and the vectors at `[RET]`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visual_ground.model import GroundedModel
from visual_ground.training.data.examples import IGNORED
from visual_ground.training.losses.captioning import LossSum


@dataclass(frozen=True)
class RetrievalOutput:
    """What the text-retrieval pass gives: the cross entropy of its labels, and the vectors (b, q) at its `[RET]`s."""

    text: LossSum
    vectors: Tensor

    @property
    def loss(self) -> Tensor:
        """The mean cross entropy of the labels."""
        return self.text.mean

    @classmethod
    def joined(cls, parts: Sequence[RetrievalOutput]) -> RetrievalOutput:
        """Return the pass over the rows of all parts, in order."""
        text = LossSum(torch.stack([part.text.total for part in parts]).sum(), sum(part.text.count for part in parts))
        return cls(text, torch.cat([part.vectors for part in parts]))


@dataclass(frozen=True)
class CaptionLikelihoods:
    """What the text loss of several captions needs, all of it independent of `[RET]`'s output row.

    Args:
        head_input: (labels, h), what the head read before each label.
        log_normaliser: (labels,), of the LM's own columns.
        label_logits: (labels - captions,), of the captions' own tokens.
        ends: (captions,), the places of `[RET]` among the labels.
    """

    head_input: Tensor
    log_normaliser: Tensor
    label_logits: Tensor
    ends: Tensor

    @classmethod
    def joined(cls, parts: Sequence[CaptionLikelihoods]) -> CaptionLikelihoods:
        """Return all captions of all parts."""
        before = torch.tensor([0, *[len(part.log_normaliser) for part in parts]]).cumsum(0)
        return cls(
            torch.cat([part.head_input for part in parts]),
            torch.cat([part.log_normaliser for part in parts]),
            torch.cat([part.label_logits for part in parts]),
            torch.cat([part.ends + count for part, count in zip(parts, before, strict=False)]),
        )

    def loss(self, row: Tensor) -> LossSum:
        """Return the summed cross entropy of all captions' tokens and `[RET]`s, for an output row (h,) of `[RET]`."""
        with torch.autocast(row.device.type, enabled=False):
            ret = self.head_input.to(row) @ row
        normaliser = torch.logaddexp(self.log_normaliser.to(ret), ret)
        own = self.label_logits.sum().to(ret)
        return LossSum(normaliser.sum() - own - ret[self.ends.to(ret.device)].sum(), len(normaliser))


def plain_retrieval(model: GroundedModel, batch: Mapping[str, Tensor]) -> RetrievalOutput:
    """Run whole captions with gradient; `PrefixCache` computes the same for less."""
    ids, labels = batch["input_ids"], batch["labels"]
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    predicting = following != IGNORED
    targets = following[predicting]
    said = (ids == model.ret_token_id) & (labels == model.ret_token_id)
    read_at = predicting | said
    places = read_at.flatten().nonzero()[:, 0]
    layers, mask = model.config.text_layers, batch["attention_mask"]
    reading = model.frozen_lm.read(ids, mask, places, layers=layers)
    at_ret, at_label = said.flatten()[places], predicting.flatten()[places]
    logits = reading.logits[at_label.to(reading.logits.device)].float()
    total = torch.nn.functional.cross_entropy(logits, targets.to(logits.device), reduction="sum")
    vectors = model.active.embed_states([states[at_ret.to(states.device)] for states in reading.states])
    return RetrievalOutput(LossSum(total, len(targets)), vectors)


def plain_states(model: GroundedModel, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """Run whole captions; return what `PrefixCache.states` returns."""
    said = (batch["input_ids"] == model.ret_token_id) & (batch["labels"] == model.ret_token_id)
    places = said.flatten().nonzero()[:, 0]
    layers = model.config.text_layers
    return model.frozen_lm.hidden_states(batch["input_ids"], batch["attention_mask"], places, layers)
