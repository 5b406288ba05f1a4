"""The captioning pass: images in, the captions' words out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from visual_ground.model import GroundedModel
from visual_ground.training.data.examples import IGNORED, LabelledIds
from visual_ground.training.speedups.cross_entropy import ret_parameters, sum_of_parts, summed_cross_entropy
from visual_ground.training.speedups.packing import PackedBatch, SharedPrefixCache, pieces, read, rows_of


@dataclass(frozen=True)
class LossSum:
    """A sum over labels, and over how many."""

    total: Tensor
    count: int

    @property
    def mean(self) -> Tensor:
        """The mean over the labels."""
        return self.total / self.count


@dataclass(frozen=True)
class ComputePlan:
    """How the losses are computed; never what they are. `plan.choose_compute_plan` finds what an LM can do.

    Args:
        packed: several captions in a row, without padding.
        direct_head: the output head runs by itself over a few labels at a time.
        leads: keys and values of what stands before the first image are kept: they depend on nothing trained.
        mini_batch_size: sequences whose activations are in memory together; None holds a batch's.
        at_once: the captions' gradients are taken within the forward pass, piece by piece, and their activations
            dropped. False leaves them to the backward pass, for wrappers that must see every gradient pass by.
    """

    packed: bool = False
    direct_head: bool = False
    leads: bool = False
    mini_batch_size: int | None = None
    at_once: bool = True


class CaptioningLoss:
    """Computes the captioning loss.

    Args:
        model: the grounded model.
        plan: how; by default plainly.
    """

    def __init__(self, model: GroundedModel, plan: ComputePlan | None = None) -> None:
        self.model, self.ways = model, ComputePlan() if plan is None else plan
        self._leads = SharedPrefixCache(model)

    def loss(self, batch: Mapping[str, Tensor], features: Tensor) -> LossSum:
        """Return the cross entropy of the labels, each row reading its own images.

        Args:
            batch: input_ids, attention_mask, labels (rows, s); its images are the first of `features`, in order.
            features: (n, f).
        """
        model, rows = self.model, rows_of(batch)
        first = model.frozen_lm.vocabulary.first_image_id
        marks = sum(i >= first for row in rows for i in row.ids)
        device = model.adapter.logit_scale.device
        table = model.adapter.image_tokens(features[: marks // model.config.num_visual_tokens].to(device))
        count = sum(label != IGNORED for row in rows for label in row.labels[1:])

        def loss_of(part: tuple[tuple[int, ...], PackedBatch], table: Tensor) -> Tensor:
            lead, piece = part
            states, output = read(model, piece, table, self._leads.get(lead), whole_head=not self.ways.direct_head)
            if self.ways.direct_head:
                return summed_cross_entropy(model, states, piece.targets)
            logits = output.logits[0].float()
            return F.cross_entropy(logits, piece.targets.to(logits.device), reduction="sum")

        if not self.ways.at_once:
            return LossSum(torch.stack([loss_of(part, table) for part in self.parts(rows)]).sum(), count)
        return LossSum(sum_of_parts(loss_of, self.parts(rows), table, ret_parameters(model)), count)

    def parts(self, rows: Sequence[LabelledIds]) -> list[tuple[tuple[int, ...], PackedBatch]]:
        """Return the pieces of the rows, each with the lead that its sequences have in common."""
        led: dict[tuple[int, ...], list[LabelledIds]] = {}
        for row in rows:
            length = self._lead_length(row) if self.ways.leads else 0
            led.setdefault(row.ids[:length], []).append(LabelledIds(row.ids[length:], row.labels[length:]))
        return [
            (lead, piece)
            for lead, some in led.items()
            for piece in pieces(self.model, some, self.ways.packed, self.ways.mini_batch_size, len(lead))
        ]

    def _lead_length(self, row: LabelledIds) -> int:
        """Return how many ids stand before the first image, none of them and not the image being predicted."""
        virtual = self.model.frozen_lm.vocabulary
        ours = (n for n, i in enumerate(row.ids) if i == virtual.ret_token_id or i >= virtual.first_image_id)
        length = next(ours, 0)
        return 0 if any(label != IGNORED for label in row.labels[: length + 1]) else length


def captioning_loss(model: GroundedModel, batch: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """Return the mean cross entropy of captions, computed plainly; the arguments are those of `CaptioningLoss.loss`."""
    return CaptioningLoss(model).loss(batch, features).mean
