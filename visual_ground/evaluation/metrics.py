"""Metrics of score matrices; nothing here knows a model."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor

from visual_ground.errors import GroundingValueError

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
    ranks = ranks_of(scores, right)
    return {f"r{k}": 100 * float((ranks <= k).double().mean()) for k in ks}


def ranks_of(scores: Tensor, right: Tensor, left_out: Tensor | None = None) -> Tensor:
    """Return the rank, from 1, of each query's best right candidate, (queries,) long.

    A wrong candidate with the same score counts as better.

    Args:
        scores: (queries, candidates).
        right: (queries, candidates) bool, which candidates are right.
        left_out: (queries, candidates) bool, candidates that are not searched; none where None.

    Raises:
        GroundingValueError: a score that is NaN, or a query without a right candidate.

    Example:
        >>> import torch
        >>> right = torch.tensor([[True, False, False]])
        >>> ranks_of(torch.tensor([[0.5, 0.5, 0.9]]), right).tolist()
        [3]
    """
    searched = torch.ones_like(right) if left_out is None else ~left_out
    right, wrong = right & searched, ~right & searched
    if not bool(right.any(1).all()):
        query = int(right.any(1).long().argmin())
        raise GroundingValueError(f"Query {query} has no right candidate among those that are searched. Leave it out.")
    if bool(scores.isnan().any()):
        query = int(scores.isnan().any(1).long().argmax())
        raise GroundingValueError(
            f"The scores of query {query} hold NaN. The adapter or the language model gives vectors that are no "
            "numbers; look at its weights and dtype."
        )
    best = scores.masked_fill(~right, float("-inf")).amax(1, keepdim=True)
    return ((scores >= best) & wrong).sum(1) + 1


def hits(rank: int | None, ks: Sequence[int] = RANKS) -> dict[str, list[float]]:
    """Return for each k, as `r<k>`, 100 where a rank is at most k and 0 else, in a list; empty lists without a rank.

    Example:
        >>> hits(3)
        {'r1': [0.0], 'r5': [100.0], 'r10': [100.0]}
    """
    return {f"r{k}": [] if rank is None else [100.0 * (rank <= k)] for k in ks}


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
    return {name: float((1 / ranks_of(*way)).double().mean()) for name, way in ways.items()}


def _of_images(texts: Tensor, images: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores (texts, images) of pairs, each image once, and which are right."""
    _, number = torch.unique(groups, return_inverse=True)
    number = number.to(texts.device)
    # The first pair of each group stands for its image.
    first = torch.full((int(number.max()) + 1,), len(number), device=number.device)
    first = first.scatter_reduce(0, number, torch.arange(len(number), device=number.device), "amin")
    right = number[:, None] == torch.arange(len(first), device=number.device)
    return texts @ images[first].T, right


def all_ranks(scores: Sequence[float]) -> list[int]:
    """Return the rank, from 1, of every candidate, none of which is NaN; those with equal scores get the worst rank.

    Example:
        >>> all_ranks([0.5, 2.0, 0.5, 1.0])
        [4, 1, 4, 2]
    """
    if any(math.isnan(score) for score in scores):
        raise GroundingValueError(f"Of {len(scores)} candidates' scores some are NaN, so they have no ranks.")
    ordered = sorted(scores)
    return [len(scores) - bisect_left(ordered, score) for score in scores]


def ndcg(relevance: Sequence[float], ranks: Sequence[int]) -> float | None:
    """Return the normalised discounted cumulative gain at k, the number of relevant candidates; None where k = 0.

    The gain of a candidate with rank r is its relevance / log2(r + 1).

    Args:
        relevance: of each candidate, 0 for none.
        ranks: of each candidate, from 1.

    Example:
        >>> round(ndcg([1.0, 0.5, 0.0], [2, 1, 3]), 4)
        0.8597
    """
    k = sum(value > 0 for value in relevance)
    gain = sum(value / math.log2(rank + 1) for value, rank in zip(relevance, ranks, strict=True) if rank <= k)
    best = sorted(relevance, reverse=True)[:k]
    ideal = sum(value / math.log2(place + 2) for place, value in enumerate(best))
    return gain / ideal if ideal else None
