"""The losses: captioning, text retrieval and contrastive, in a module whose forward returns them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn
from transformers.utils import ModelOutput

from visual_ground.model import GroundedModel
from visual_ground.training.losses.cached_retrieval import PrefixCache, run_retrieval
from visual_ground.training.losses.captioning import CaptioningLoss, ComputePlan, LossSum
from visual_ground.training.losses.contrastive import FeatureBank, contrast, share_of_processes
from visual_ground.training.speedups.checkpointing import LayerCheckpoints


@dataclass
class GroundingLoss(ModelOutput):
    """What one batch costs, and how well text and images find each other in it.

    Args:
        loss: the weighted sum, the only one with a gradient.
        captioning: mean cross entropy of the captions' tokens after their images.
        text_retrieval: mean cross entropy of the captions' tokens and `[RET]`, without images.
        text_to_image: cross entropy of each text's own image among the batch's.
        image_to_text: the other way.
        text_to_image_accuracy: part of the texts whose own image comes first.
        image_to_text_accuracy: the other way.
    """

    loss: Tensor | None = None
    captioning: Tensor | None = None
    text_retrieval: Tensor | None = None
    text_to_image: Tensor | None = None
    image_to_text: Tensor | None = None
    text_to_image_accuracy: Tensor | None = None
    image_to_text_accuracy: Tensor | None = None


class GroundingObjective(nn.Module):
    r"""A grounded model whose forward returns the losses, as a distributed wrapper needs it.

    .. math::
        L = \lambda_c L_{caption} + \lambda_r (L_{text} + \tfrac12 (L_{t2i} + L_{i2t}))

    (Koh et al. 2023, section 3.2.) In training, where torch.distributed runs, the losses are those of all processes'
    batches as one: means are over all labels, and every text meets every image.

    Args:
        model: the grounded model.
        caption_loss_scale: the first weight.
        retrieval_loss_scale: the second weight.
        prefixes: runs what stands before `[RET]` without gradient and keeps it; None runs the plain computation.
        plan: how the losses are computed, never what they are; by default plainly.
        bank: further images that texts are compared with in training.

    Attributes:
        prefixes, plan, bank: may be set anew between batches.
    """

    def __init__(
        self,
        model: GroundedModel,
        caption_loss_scale: float = 1.0,
        retrieval_loss_scale: float = 1.0,
        prefixes: PrefixCache | None = None,
        plan: ComputePlan | None = None,
        bank: FeatureBank | None = None,
    ) -> None:
        super().__init__()
        self.model, self.prefixes, self.bank = model, prefixes, bank
        self.caption_loss_scale, self.retrieval_loss_scale = caption_loss_scale, retrieval_loss_scale
        self._checkpoints = LayerCheckpoints(model.lm)
        self.plan = ComputePlan() if plan is None else plan

    @property
    def plan(self) -> ComputePlan:
        """How the losses are computed."""
        return self._shortcuts

    @plan.setter
    def plan(self, plan: ComputePlan) -> None:
        self._shortcuts, self._captions = plan, CaptioningLoss(self.model, plan)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **_: object) -> None:
        """Compute the LM's layers again in the backward pass instead of keeping what they computed.

        Args:
            activation_checkpointing_kwargs: for `torch.utils.checkpoint.checkpoint`.
        """
        self._checkpoints.enable(activation_checkpointing_kwargs)

    gradient_checkpointing_enable = activation_checkpointing_enable

    def forward(
        self,
        captioning: Mapping[str, Tensor],
        retrieval: Mapping[str, Tensor],
        groups: Tensor,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> GroundingLoss:
        """Compute the losses of one batch, as `ExampleCollator` makes it.

        Args:
            captioning: input_ids, attention_mask, labels (rows, s).
            retrieval: likewise (b, s); each row's last id is `[RET]`.
            groups: (b,), equal where two examples are no negatives of each other.
            pixel_values: (b, c, h, w).
            image_features: (b, f), instead of pixels.
            rows: (b,), the examples' numbers in the dataset; not used here.
        """
        features = self.model.vision(pixel_values) if image_features is None else image_features
        with self._checkpoints.active():
            captions = self._mean(self._captions.loss(captioning, features))
        mini_batch_size, context = self.plan.mini_batch_size, self._checkpoints.active
        result = run_retrieval(self.model, retrieval, self.prefixes, mini_batch_size, context)
        found = contrast(
            self.model.adapter,
            result.vectors,
            features,
            groups,
            self.bank if self.training else None,
            self._together,
        )
        text = self._mean(result.text)
        weighted = self.retrieval_loss_scale * (text + (found.text_to_image + found.image_to_text) / 2)
        return GroundingLoss(
            loss=self.caption_loss_scale * captions + weighted,
            captioning=captions.detach(),
            text_retrieval=text.detach(),
            text_to_image=found.text_to_image.detach(),
            image_to_text=found.image_to_text.detach(),
            text_to_image_accuracy=found.text_to_image_accuracy,
            image_to_text_accuracy=found.image_to_text_accuracy,
        )

    @property
    def _together(self) -> bool:
        """Whether this batch is part of one that is spread over processes."""
        return self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    def _mean(self, summed: LossSum) -> Tensor:
        if not self._together:
            return summed.mean
        return summed.total / share_of_processes(summed.count, summed.total.device)
