"""Contrastive learning: text and image of one pair against all others of the batch, of all processes together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from visual_ground.adapter.adapter import Adapter


@dataclass(frozen=True)
class Contrast:
    """Cross entropies text -> image and image -> text, and the parts of queries whose own partner came first."""

    text_to_image: Tensor
    image_to_text: Tensor
    text_to_image_accuracy: Tensor
    image_to_text_accuracy: Tensor


def contrast(
    adapter: Adapter, vectors: Tensor, features: Tensor, groups: Tensor, across_processes: bool = False
) -> Contrast:
    """Compare the texts and images of a batch.

    Across processes every text is compared with the images of all, and every image with the texts of all, and the
    gradients go back to where these came from. The mean of the processes' losses, and of their gradients as DDP takes
    it, is that of one process with the whole batch.

    Args:
        adapter: maps features to vectors and holds the temperature.
        vectors: (b, q), unit length.
        features: (b, f), of each text's image.
        groups: (b,), equal if two pairs are no negatives of each other, in all processes.
        across_processes: whether this batch is one process's part of a larger one.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        images = adapter.embed_images(features)
        all_texts, all_images, all_groups, start, weight = vectors, images, groups, 0, 1.0
        if across_processes:
            counts = _counts(vectors)
            all_texts, all_images, all_groups = (gathered(tensor, counts) for tensor in (vectors, images, groups))
            start = sum(counts[: dist.get_rank()])
            # If processes have batches of different sizes, each counts by its size.
            weight = len(vectors) * len(counts) / sum(counts)
        own = torch.arange(start, start + len(vectors), device=vectors.device)
        scale = adapter.logit_scale.exp()
        texts = _masked(scale * vectors @ all_images.T, own, groups, all_groups)
        pictures = _masked(scale * images @ all_texts.T, own, groups, all_groups)
        return Contrast(
            weight * F.cross_entropy(texts, own),
            weight * F.cross_entropy(pictures, own),
            (texts.argmax(1) == own).float().mean(),
            (pictures.argmax(1) == own).float().mean(),
        )


def _masked(scores: Tensor, own: Tensor, groups: Tensor, all_groups: Tensor) -> Tensor:
    """Set the scores (b, m) of a query's own group to -inf, but for its own pair, in column `own`."""
    same = groups[:, None] == all_groups[None]
    same = same.to(scores.device).scatter(1, own[:, None], False)
    return scores.masked_fill(same, float("-inf"))


def _counts(tensor: Tensor) -> list[int]:
    """Return how many entries each process has; this waits for the GPU, once in a step of several processes."""
    own = torch.tensor([len(tensor)], device=tensor.device)
    every = [torch.zeros_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(every, own)
    counts: list[int] = torch.cat(every).tolist()
    return counts


def gathered(tensor: Tensor, counts: list[int]) -> Tensor:
    """Return the entries of all processes, in the order of their ranks; gradients go back to each entry's own process.

    Args:
        tensor: (n, ...), where n is this process's of the counts.
        counts: how many entries each process has.
    """
    entries: Tensor = _Gather.apply(tensor, counts)
    return entries


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        # Collectives need equal shapes, so the short ones are filled up.
        padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        every = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(every, padded)
        return torch.cat([part[:count] for part, count in zip(every, counts, strict=True)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        start = sum(ctx.counts[: dist.get_rank()])
        return total[start : start + ctx.counts[dist.get_rank()]], None


def share_of_processes(count: int, device: torch.device) -> Tensor:
    """Return the mean over the processes of how many labels each has.

    A process's summed loss divided by it has, in the mean over the processes, the value and gradient of the mean over
    all processes' labels.
    """
    total = torch.tensor([float(count)], device=device)
    dist.all_reduce(total)
    return total[0] / dist.get_world_size()
