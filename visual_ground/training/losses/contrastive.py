"""Contrastive learning: text and image of one pair against all others of the batch, of all processes, of a bank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from visual_ground.adapter.adapter import Adapter
from visual_ground.errors import GroundingValueError
from visual_ground.training.data.examples import ExampleDataset


@dataclass(frozen=True)
class Contrast:
    """Cross entropies text -> image and image -> text, and the parts of queries whose own came first."""

    text_to_image: Tensor
    image_to_text: Tensor
    text_to_image_accuracy: Tensor
    image_to_text_accuracy: Tensor


def contrast(
    adapter: Adapter,
    vectors: Tensor,
    features: Tensor,
    groups: Tensor,
    bank: FeatureBank | None = None,
    across_processes: bool = False,
) -> Contrast:
    """Compare the texts and images of a batch.

    Across processes every text is compared with the images of all, and every image with the texts of all, and the
    gradients go back to where these came from. The mean of the processes' losses, and of their gradients as DDP takes
    it, is that of one process with the whole batch.

    Args:
        adapter: maps features to vectors and holds the temperature.
        vectors: (b, q), unit length.
        features: (b, f), of each text's image.
        groups: (b,), equal where two pairs are no negatives of each other, in all processes.
        bank: more images, which only texts are compared with.
        across_processes: whether to.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        return _contrast(adapter, vectors, features, groups, bank, across_processes)


def _contrast(
    adapter: Adapter,
    vectors: Tensor,
    features: Tensor,
    groups: Tensor,
    bank: FeatureBank | None,
    across_processes: bool,
) -> Contrast:
    images = adapter.embed_images(features)
    all_texts, all_images, all_groups, start, weight = vectors, images, groups, 0, 1.0
    if across_processes:
        all_texts, all_images, all_groups = (gathered(tensor) for tensor in (vectors, images, groups))
        counts = _counts(vectors)
        start = int(counts[: dist.get_rank()].sum())
        # Where processes have more and fewer rows, each counts by its rows.
        weight = len(vectors) * len(counts) / int(counts.sum())
    own = torch.arange(start, start + len(vectors), device=vectors.device)
    scale = adapter.logit_scale.exp()
    texts = _masked(scale * vectors @ all_images.T, own, groups, all_groups)
    found = _masked(scale * images @ all_texts.T, own, groups, all_groups)
    if bank is not None:
        texts = torch.cat([texts, bank.scores(adapter, scale * vectors, groups)], 1)
    return Contrast(
        weight * F.cross_entropy(texts, own),
        weight * F.cross_entropy(found, own),
        (texts.argmax(1) == own).float().mean(),
        (found.argmax(1) == own).float().mean(),
    )


def _masked(scores: Tensor, own: Tensor, groups: Tensor, all_groups: Tensor) -> Tensor:
    """Set the scores (b, m) of a query's own group to -inf, but for its own pair, in column `own`."""
    same = groups[:, None] == all_groups[None]
    same = same.to(scores.device).scatter(1, own[:, None], False)
    return scores.masked_fill(same, float("-inf"))


class FeatureBank:
    """The features of all training images, as further negatives of texts: their side is one linear layer.

    Args:
        features: (n, f), the images of the training set; kept on the CPU, or wherever they are.
        groups: (n,), the group of each.
        size: how many of them, drawn anew for each batch, are negatives; all where n is no larger.

    Raises:
        GroundingValueError: a size below 1, or another number of groups than of features.
    """

    def __init__(self, features: Tensor, groups: Tensor, size: int) -> None:
        if size < 1 or len(features) != len(groups):
            raise GroundingValueError(
                f"A bank needs a size of at least 1 and a group for each feature; got size {size}, {len(features)} "
                f"features and {len(groups)} groups."
            )
        self.features, self.groups, self.size = features, groups, size

    @classmethod
    def of(cls, examples: ExampleDataset, size: int) -> FeatureBank:
        """Build a bank of all images of a dataset whose features are known.

        Args:
            examples: the dataset.
            size: as above.

        Raises:
            GroundingValueError: a dataset without features.
        """
        if getattr(examples, "groups", None) is None or examples.features is None:
            raise GroundingValueError("A bank needs a dataset with image features; let the trainer cache them.")
        features = [examples.features[number] for number in range(len(examples))]
        groups = [int(group) for group, images in zip(examples.groups, features, strict=True) for _ in images]
        return cls(torch.cat(features), torch.tensor(groups), size)

    def scores(self, adapter: Adapter, queries: Tensor, groups: Tensor) -> Tensor:
        """Return the scores (b, size) of scaled text vectors (b, q); -inf for images of a text's own group."""
        features, others = self.features, self.groups
        if self.size < len(features):
            drawn = torch.randint(len(features), (self.size,))
            features, others = features[drawn.to(features.device)], others[drawn.to(others.device)]
        images = adapter.embed_images(features.to(queries.device))
        same = groups.to(queries.device)[:, None] == others.to(queries.device)[None]
        return (queries @ images.T).masked_fill(same, float("-inf"))


def _counts(tensor: Tensor) -> Tensor:
    """Return how many rows each process has."""
    own = torch.tensor([len(tensor)], device=tensor.device)
    every = [torch.zeros_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(every, own)
    return torch.cat(every)


def gathered(tensor: Tensor) -> Tensor:
    """Return the rows of all processes, in the order of their ranks; gradients go back to each row's own process."""
    return _Gather.apply(tensor)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        counts = _counts(tensor).tolist()
        ctx.counts = counts
        # Collectives want equal shapes, so that the short ones are filled up.
        padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        every = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(every, padded)
        return torch.cat([rows[:count] for rows, count in zip(every, counts, strict=True)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total.split(ctx.counts)[dist.get_rank()]


def share_of_processes(count: int, device: torch.device) -> float:
    """Return the mean over the processes of how many labels each has.

    A process's summed loss divided by it has, in the mean over the processes, the value and gradient of the mean over
    all processes' labels.
    """
    total = torch.tensor([float(count)], device=device)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def contrastive_losses(scores: Tensor, groups: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the cross entropies text -> image and image -> text of scores (b, b), pairs on the diagonal.

    Args:
        scores: scaled cosines, texts in rows.
        groups: (b,); pairs of one group off the diagonal count as neither right nor wrong.
    """
    own = torch.arange(len(scores), device=scores.device)
    groups = own if groups is None else groups.to(scores.device)
    text, image = (F.cross_entropy(_masked(way, own, groups, groups), own) for way in (scores, scores.T))
    return text, image
