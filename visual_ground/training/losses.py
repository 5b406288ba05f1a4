"""The losses: captioning, text retrieval and contrastive, from the LM's logits at labelled positions only."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from visual_ground.model import GroundedModel
from visual_ground.training.examples import IGNORED
from visual_ground.training.prefixes import PrefixStore, RetrievalPass

logger = logging.getLogger(__name__)


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

    (Koh et al. 2023, section 3.2.)

    Args:
        model: the grounded model.
        caption_loss_scale: the first weight.
        retrieval_loss_scale: the second weight.
        prefixes: runs what stands before `[RET]` without gradient and keeps it; None runs the plain computation.
    """

    def __init__(
        self,
        model: GroundedModel,
        caption_loss_scale: float = 1.0,
        retrieval_loss_scale: float = 1.0,
        prefixes: PrefixStore | None = None,
    ) -> None:
        super().__init__()
        self.model, self.prefixes = model, prefixes
        self.caption_loss_scale, self.retrieval_loss_scale = caption_loss_scale, retrieval_loss_scale

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
        caption_loss = captioning_loss(self.model, captioning, features)
        if self.prefixes is not None and self.prefixes.fits(retrieval):
            result = self.prefixes.run(retrieval)
        else:
            result = plain_retrieval(self.model, retrieval)
        images = self.model.adapter.embed_images(features)
        scores = self.model.adapter.logit_scale.exp() * result.vectors @ images.T
        text, image = contrastive_losses(scores, groups)
        found = torch.arange(len(scores), device=scores.device)
        weighted = self.retrieval_loss_scale * (result.loss + (text + image) / 2)
        return GroundingLoss(
            loss=self.caption_loss_scale * caption_loss + weighted,
            captioning=caption_loss.detach(),
            text_retrieval=result.loss.detach(),
            text_to_image=text.detach(),
            image_to_text=image.detach(),
            text_to_image_accuracy=(scores.argmax(1) == found).float().mean(),
            image_to_text_accuracy=(scores.argmax(0) == found).float().mean(),
        )


def captioning_loss(model: GroundedModel, batch: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """Return the mean cross entropy of the labels, each row reading its own images.

    Args:
        model: the grounded model.
        batch: input_ids, attention_mask, labels (rows, s); its images are the first of `features`, in order.
        features: (n, f).
    """
    ids = batch["input_ids"]
    marks = int((ids >= model.facts.vocabulary.first_image_id).sum())
    rows = model.image_rows(image_features=features[: marks // model.config.num_visual_tokens])
    total = torch.zeros((), device=ids.device)
    for some in _of_like_length(batch["attention_mask"].sum(-1)):
        part = {name: tensor[some] for name, tensor in batch.items()}
        longest = int(part["attention_mask"].sum(-1).max())
        predicting, targets = predictors(part["labels"][:, :longest])
        with model.bind(rows, predicting):
            output = model.run(part["input_ids"][:, :longest], part["attention_mask"][:, :longest], use_cache=False)
        logits = output.logits[0].float()
        total = total + F.cross_entropy(logits, targets.to(logits.device), reduction="sum").to(total)
    return total / predictors(batch["labels"])[1].numel()


def _of_like_length(lengths: Tensor) -> list[Tensor]:
    """Return the numbers of the rows in groups whose longest is less than twice the shortest: padding costs time."""
    groups: list[list[int]] = []
    for row in lengths.argsort(descending=True).tolist():
        if not groups or 2 * int(lengths[row]) <= int(lengths[groups[-1][0]]):
            groups.append([])
        groups[-1].append(row)
    return [torch.tensor(group, device=lengths.device) for group in groups]


def plain_retrieval(model: GroundedModel, batch: Mapping[str, Tensor]) -> RetrievalPass:
    """Run whole captions with gradient; `prefixes.PrefixStore` computes the same for less."""
    ids = batch["input_ids"]
    predicting, targets = predictors(batch["labels"])
    said = (ids == model.ret_token_id) & (batch["labels"] == model.ret_token_id)
    read = predicting | said
    with model.bind(None, read) as call:
        output = model.run(
            ids, batch["attention_mask"], use_cache=False, output_hidden_states=model.needs_hidden_states
        )
        call.head_input = call.head_input[:, said[read]]
    loss = F.cross_entropy(output.logits[0][predicting[read]].float(), targets.to(output.logits.device))
    return RetrievalPass(loss, model.ret_embeddings(call, output, said))


@torch.no_grad()
def choose_prefixes(model: GroundedModel, batch: Mapping[str, Tensor], limit_bytes: int) -> PrefixStore | None:
    """Return a `PrefixStore` where, on rows of this batch, it gives what the plain computation gives; else None.

    State spaces keep no keys and values, capped logits cap `[RET]`'s column too, some LMs cannot be padded on the left:
    rather than to know them all, both ways are run once and compared.

    Args:
        model: the grounded model.
        batch: the retrieval part of a batch.
        limit_bytes: as in `PrefixStore`.
    """
    some = {name: tensor[:8] for name, tensor in batch.items()}
    plain = plain_retrieval(model, some)
    try:
        store = PrefixStore(model)
        quick = store.run(some)
    except Exception as error:  # whatever an unknown LM raises here means that its captions run plainly
        logger.info("Captions run as a whole in each step: %s", error)
        return None
    room = 1e-3 if model.lm.dtype == torch.float32 else 3e-2
    if torch.allclose(quick.loss, plain.loss, rtol=room) and torch.allclose(quick.vectors, plain.vectors, atol=room):
        return PrefixStore(model, limit_bytes, store.window)
    logger.info("Captions run as a whole in each step: their prefixes give other values in this LM.")
    return None


def predictors(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions (b, s) bool whose next id is a label, and those labels in the same order.

    Example:
        >>> predictors(torch.tensor([[-100, 5, 6]]))
        (tensor([[ True,  True, False]]), tensor([5, 6]))
    """
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    positions = following != IGNORED
    return positions, following[positions]


def contrastive_losses(scores: Tensor, groups: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the cross entropies text -> image and image -> text of scores (b, b), pairs on the diagonal.

    Args:
        scores: scaled cosines, texts in rows.
        groups: (b,); pairs of one group off the diagonal count as neither right nor wrong.
    """
    own = torch.arange(len(scores), device=scores.device)
    if groups is not None:
        groups = groups.to(scores.device)
        same = (groups[:, None] == groups[None]) & ~torch.eye(len(scores), dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(same, float("-inf"))
    return F.cross_entropy(scores, own), F.cross_entropy(scores.T, own)
