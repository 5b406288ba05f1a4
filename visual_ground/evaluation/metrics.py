"""Metrics of score matrices; nothing here knows a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RANKS = (1, 5, 10)  # those that retrieval papers report, FROMAGe's among them


def recall_at(scores: Tensor, ks: Sequence[int] = RANKS, right: Tensor | None = None) -> dict[str, float]:
    """Return the percentage of queries that have a right candidate among the best k, as `r<k>`.

    Args:
        scores: (queries, candidates). A wrong candidate with the score of the best right one counts as better.
        ks: the ranks.
        right: (queries, candidates) bool, which candidates are right, at least one for each query; query i's right
            candidate is i where None.

    Example:
        >>> import torch
        >>> recall_at(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), ks=(1, 2))
        {'r1': 50.0, 'r2': 100.0}
    """
    if right is None:
        right = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    better = _num_better(scores, right)
    return {f"r{k}": 100 * float((better < k).double().mean()) for k in ks}


def retrieval_recalls(texts: Tensor, images: Tensor, groups: Tensor) -> dict[str, dict[str, float]]:
    """Return the recalls both ways, in percent, of pairs whose images may come several times.

    Pairs of one group are about the same image, as the five captions of an image in Flickr30k and COCO are. An image is
    one candidate, and one query, however many captions it has; each of its captions is right for it.

    Args:
        texts: (n, q) unit vectors.
        images: (n, q) unit vectors, of each text's image.
        groups: (n,), equal where two pairs are about the same image.
    """
    scores, right = _of_images(texts, images, groups)
    return {"text_to_image": recall_at(scores, right=right), "image_to_text": recall_at(scores.T, right=right.T)}


def mean_reciprocal_ranks(texts: Tensor, images: Tensor, groups: Tensor) -> dict[str, float]:
    """Return the means of 1 / rank of the best right candidate both ways; the arguments are of `retrieval_recalls`."""
    scores, right = _of_images(texts, images, groups)
    ways = {"text_to_image": (scores, right), "image_to_text": (scores.T, right.T)}
    return {name: float((1 / (1 + _num_better(*way))).double().mean()) for name, way in ways.items()}


def _num_better(scores: Tensor, right: Tensor) -> Tensor:
    """Return how many wrong candidates come before each query's best right one, (queries,)."""
    best = scores.masked_fill(~right, float("-inf")).amax(1, keepdim=True)
    return ((scores >= best) & ~right).sum(1)


def _of_images(texts: Tensor, images: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores (texts, images) of pairs, each image once, and which are right."""
    _, number = torch.unique(groups, return_inverse=True)
    number = number.to(texts.device)
    # The first pair of each group stands for its image.
    first = torch.full((int(number.max()) + 1,), len(number), device=number.device)
    first = first.scatter_reduce(0, number, torch.arange(len(number), device=number.device), "amin")
    right = number[:, None] == torch.arange(len(first), device=number.device)
    return texts @ images[first].T, right
