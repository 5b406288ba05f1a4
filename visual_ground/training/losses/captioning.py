"""The captioning loss: the LM reads an image and predicts its caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from visual_ground.errors import GroundingIndexError
from visual_ground.model import GroundedModel
from visual_ground.training.data.sequences import IGNORE_INDEX, TokenSequence
from visual_ground.training.speedups.cross_entropy import ret_parameters, sum_of_parts, summed_cross_entropy
from visual_ground.training.speedups.kv_cache import SharedPrefixCache
from visual_ground.training.speedups.packing import PackedBatch, lay_out, read

Prefix = tuple[int, ...]


@dataclass(frozen=True)
class LossSum:
    """A loss summed over labels, and the number of these."""

    total: Tensor
    count: int

    @property
    def mean(self) -> Tensor:
        """The mean over the labels."""
        return self.total / self.count


@dataclass(frozen=True)
class ComputePlan:
    """How the losses are computed, never what they are; `compute_plan.choose_compute_plan` finds what an LM can do.

    Args:
        packed: several captions share a row of the LM's batch, without padding.
        direct_head: the output head runs by itself, over a few labels at a time.
        shared_prefix: the prompt prefix before the first image runs once, because it depends on nothing trained.
        mini_batch_size: sequences whose activations are in memory together; None holds a whole batch's.
        gradients_in_forward: the captions' gradients are computed within the forward pass, part by part, and their
            activations dropped. False leaves them to the backward pass, for wrappers that must see every gradient.
    """

    packed: bool = False
    direct_head: bool = False
    shared_prefix: bool = False
    mini_batch_size: int | None = None
    gradients_in_forward: bool = True


class CaptioningLoss:
    """Computes the captioning loss."""

    def __init__(self, model: GroundedModel, plan: ComputePlan | None = None) -> None:
        self.model, self.plan = model, ComputePlan() if plan is None else plan
        self._prefixes = SharedPrefixCache(model)

    def loss(self, sequences: Sequence[TokenSequence], features: Tensor) -> LossSum:
        """Return the cross entropy of the labels, each sequence reading its own images.

        Args:
            sequences: their images are the first of `features`, in order.
            features: (n, f).

        Raises:
            GroundingIndexError: more images in the sequences than features.
        """
        model = self.model
        first = model.frozen_lm.vocabulary.first_image_id
        num_images = sum(i >= first for s in sequences for i in s.ids) // model.config.num_visual_tokens
        if num_images > len(features):
            raise GroundingIndexError(
                f"The captioning sequences have {num_images} images, and there are features of {len(features)}. Pass "
                "the images of the examples that the sequences were made of."
            )
        image_tokens = model.adapter.image_tokens(features[:num_images].to(model.frozen_lm.device))
        count, parts = sum(sequence.num_labels for sequence in sequences), self.parts(sequences)
        if not self.plan.gradients_in_forward:
            return LossSum(torch.stack([self._part_loss(part, image_tokens) for part in parts]).sum(), count)
        return LossSum(sum_of_parts(self._part_loss, parts, image_tokens, ret_parameters(model)), count)

    def _part_loss(self, part: tuple[Prefix, PackedBatch], image_tokens: Tensor) -> Tensor:
        prefix, batch = part
        direct = self.plan.direct_head
        # Where the head runs by itself, the LM's own run of it is cut to one position: it cannot be left out.
        max_logits = 1 if direct else None
        keys_values = self._prefixes.get(prefix)
        reading = read(self.model, batch, image_tokens=image_tokens, prefix=keys_values, max_logits=max_logits)
        if direct:
            return summed_cross_entropy(self.model, reading.head_input, batch.targets)
        logits = reading.logits.float()
        return F.cross_entropy(logits, batch.targets.to(logits.device), reduction="sum")

    def parts(self, sequences: Sequence[TokenSequence]) -> list[tuple[Prefix, PackedBatch]]:
        """Return the batches that are run one after the other, each with the prefix that its sequences share."""
        by_prefix: dict[Prefix, list[TokenSequence]] = {}
        for sequence in sequences:
            n = self._prefix_length(sequence) if self.plan.shared_prefix else 0
            by_prefix.setdefault(sequence.ids[:n], []).append(TokenSequence(sequence.ids[n:], sequence.labels[n:]))
        return [
            (prefix, batch)
            for prefix, rest in by_prefix.items()
            for batch in lay_out(self.model, rest, self.plan.packed, self.plan.mini_batch_size, len(prefix))
        ]

    def _prefix_length(self, sequence: TokenSequence) -> int:
        """Return how many ids stand before the first virtual one, or 0 where any id up to it is to be predicted."""
        ret, first = self.model.ret_token_id, self.model.frozen_lm.vocabulary.first_image_id
        length = next((n for n, i in enumerate(sequence.ids) if i == ret or i >= first), 0)
        return 0 if any(label != IGNORE_INDEX for label in sequence.labels[: length + 1]) else length


def captioning_loss(model: GroundedModel, sequences: Sequence[TokenSequence], features: Tensor) -> Tensor:
    """Return the mean cross entropy of captions, computed plainly; the arguments are those of `CaptioningLoss.loss`."""
    return CaptioningLoss(model).loss(sequences, features).mean
