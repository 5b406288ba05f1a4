"""The training objective: a module whose forward returns the losses, and the door for losses of one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from visual_ground.errors import GroundingValueError
from visual_ground.model import GroundedModel
from visual_ground.processes import Processes
from visual_ground.training.data.sequences import TokenSequence
from visual_ground.training.losses.cached_retrieval import PrefixCache
from visual_ground.training.losses.captioning import CaptioningLoss, ComputePlan, LossSum
from visual_ground.training.losses.contrastive import Contrast, contrast, share_of_processes
from visual_ground.training.losses.prompts import Asked
from visual_ground.training.speedups.checkpointing import LayerCheckpoints


@dataclass
class GroundingLoss(ModelOutput):
    """The losses of one batch, and how well its texts and images find each other.

    Args:
        loss: what is minimised, the only one with a gradient.
        captioning: mean cross entropy of the captions' tokens after their images.
        text_retrieval: mean cross entropy of the captions' tokens and `[RET]`, without images.
        text_to_image: cross entropy of each text's own image among the batch's.
        image_to_text: the reverse.
        text_to_image_accuracy: part of the texts whose own image comes first.
        image_to_text_accuracy: the reverse.
        terms: further numbers of a loss of one's own, by name; they are logged.
    """

    loss: Tensor | None = None
    captioning: Tensor | None = None
    text_retrieval: Tensor | None = None
    text_to_image: Tensor | None = None
    image_to_text: Tensor | None = None
    text_to_image_accuracy: Tensor | None = None
    image_to_text_accuracy: Tensor | None = None
    terms: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class PreparedBatch:
    """One batch as a loss reads it.

    Args:
        captioning: sequences that read images, which are the first of `features` in order.
        retrieval: b sequences, each with `[RET]` as its last id.
        features: (b, f), the images' features, on the adapter's device.
        groups: (b,), equal where two examples are no negatives of each other.
        prompt_features: (m, f), of the images in `retrieval`, in order; None without any.
    """

    captioning: Sequence[TokenSequence]
    retrieval: Sequence[TokenSequence]
    features: Tensor
    groups: Tensor
    prompt_features: Tensor | None = None


class Loss(Protocol):
    """What `GroundingObjective` and `GroundingTrainer` take as `loss=`: a callable that gives a batch's loss.

    It may use the passes of the objective, which run by the fastest way that the LM allows, or the model itself
    (`objective.model`). A loss with parameters of its own is an `nn.Module`; `GroundingTrainer` refuses trainable ones,
    since its checkpoints hold only the adapter's.

    Example:
        >>> def only_captioning(objective, batch):
        ...     captioning = objective.captioning(batch)
        ...     return GroundingLoss(loss=captioning, captioning=captioning.detach())
    """

    def __call__(self, objective: GroundingObjective, batch: PreparedBatch) -> GroundingLoss:
        """Return the losses, of which `loss` is minimised and all others, those in `terms` too, are logged."""


@dataclass(frozen=True)
class FromageLoss:
    r"""The published loss.

    .. math::
        L = \lambda_c L_{caption} + \lambda_r (L_{text} + \tfrac12 (L_{t2i} + L_{i2t}))

    (Koh et al. 2023, section 3.2.)

    Args:
        caption_loss_scale: the first weight.
        retrieval_loss_scale: the second weight.
    """

    caption_loss_scale: float = 1.0
    retrieval_loss_scale: float = 1.0

    def __call__(self, objective: GroundingObjective, batch: PreparedBatch) -> GroundingLoss:
        """Return the weighted sum and its parts; a part without weight is not computed, and is None.

        Raises:
            GroundingValueError: both weights are 0.
        """
        found: dict[str, Any] = {}
        terms: list[Tensor] = []
        if self.caption_loss_scale:
            found["captioning"] = objective.captioning(batch)
            terms.append(self.caption_loss_scale * found["captioning"])
        if self.retrieval_loss_scale:
            found["text_retrieval"], vectors = objective.text_retrieval(batch)
            contrastive = objective.contrast(vectors, batch)
            found |= vars(contrastive)
            retrieval = found["text_retrieval"] + (contrastive.text_to_image + contrastive.image_to_text) / 2
            terms.append(self.retrieval_loss_scale * retrieval)
        if not terms:
            raise GroundingValueError("caption_loss_scale and retrieval_loss_scale are both 0: nothing is trained.")
        if len(terms) == 1:
            # DistributedDataParallel waits for a gradient of every parameter, also of those that only a part has.
            trained = (parameter for parameter in objective.parameters() if parameter.requires_grad)
            terms.append(0 * torch.stack([parameter.sum() for parameter in trained]).sum())
        return GroundingLoss(loss=torch.stack(terms).sum(), **{name: value.detach() for name, value in found.items()})


class GroundingObjective(nn.Module):
    """A grounded model whose forward returns the losses, as a distributed wrapper needs it.

    In training, where torch.distributed runs, the losses are those of all processes' batches as one: means are over all
    labels, and every text meets every image.

    Args:
        model: the grounded model.
        loss: what is computed; the published loss by default.
        prefixes: runs captions up to `[RET]` without gradient and keeps the result; None runs whole captions.
        plan: how the losses are computed, never what they are; by default plainly.

    Attributes:
        prefixes: may be set between batches.
        plan: likewise.
    """

    def __init__(
        self,
        model: GroundedModel,
        loss: Loss | None = None,
        prefixes: PrefixCache | None = None,
        plan: ComputePlan | None = None,
    ) -> None:
        super().__init__()
        self.model, self.prefixes = model, prefixes
        self.loss: Loss = FromageLoss() if loss is None else loss
        self._checkpoints = LayerCheckpoints(model.lm)
        self.plan = ComputePlan() if plan is None else plan

    @property
    def plan(self) -> ComputePlan:
        """How the losses are computed."""
        return self._captions.plan

    @plan.setter
    def plan(self, plan: ComputePlan) -> None:
        self._captions = CaptioningLoss(self.model, plan)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **_: object
    ) -> None:
        """Compute the LM's layers again in the backward pass instead of keeping their activations."""
        self._checkpoints.enable(activation_checkpointing_kwargs)

    # `Trainer` calls the one or the other, depending on the version of transformers.
    gradient_checkpointing_enable = activation_checkpointing_enable

    def forward(
        self,
        captioning: Sequence[TokenSequence],
        retrieval: Sequence[TokenSequence],
        groups: Tensor,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        rows: Tensor | None = None,
        prompt_features: Tensor | None = None,
        prompt_pixels: Tensor | None = None,
    ) -> GroundingLoss:
        """Compute the losses of one batch, as `ExampleCollator` makes it.

        Args:
            captioning: sequences with images.
            retrieval: b sequences; each one's last id is `[RET]`.
            groups: (b,), equal where two examples are no negatives of each other.
            pixel_values: (b, c, h, w).
            image_features: (b, f), instead of pixels.
            rows: (b,), the examples' numbers in the dataset; not used here.
            prompt_features: (m, f), of the images in `retrieval`, in order.
            prompt_pixels: (m, c, h, w), instead of these.
        """
        features = self.model.vision(pixel_values) if image_features is None else image_features
        if prompt_pixels is not None:
            prompt_features = self.model.vision(prompt_pixels)
        return self.loss(self, PreparedBatch(captioning, retrieval, features, groups, prompt_features))

    def captioning(self, batch: PreparedBatch) -> Tensor:
        """Return the mean cross entropy of the captions' tokens after their images."""
        with self._checkpoints.active():
            return self._mean(self._captions.loss(batch.captioning, batch.features))

    def text_retrieval(self, batch: PreparedBatch) -> tuple[Tensor, Tensor]:
        """Return the mean cross entropy of the captions' tokens and `[RET]`, and the vectors (b, q) for retrieval."""
        mini_batch_size, context = self.plan.mini_batch_size, self._checkpoints.active
        asked = Asked.of(self.model, batch.retrieval, batch.prompt_features)
        output = asked.run(self.prefixes, mini_batch_size, context)
        vectors = output.vectors
        if self.model.config.retrieval_prompt and not self.model.adapter.tied:
            # `[RET]` is not read then, and DDP waits for the gradient of every trained parameter.
            vectors = vectors + 0 * self.model.adapter.ret_input.sum()
        return self._mean(output.text), vectors

    def contrast(self, vectors: Tensor, batch: PreparedBatch) -> Contrast:
        """Compare the vectors (b, q) at `[RET]` with the batch's images."""
        return contrast(self.model.adapter, vectors, batch.features, batch.groups, self._across_processes)

    @property
    def _across_processes(self) -> bool:
        """Whether this batch is a part of one that is shared out among processes."""
        return self.training and Processes.launched().count > 1

    def _mean(self, summed: LossSum) -> Tensor:
        if not self._across_processes:
            return summed.mean
        return summed.total / share_of_processes(summed.count, summed.total.device)
