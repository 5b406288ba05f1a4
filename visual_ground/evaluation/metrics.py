"""Metrics of score matrices; nothing here knows a model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

RANKS = (1, 5, 10)  # those that retrieval papers report, FROMAGe's among them


def recall_at(scores: Tensor, ks: Sequence[int] = RANKS) -> dict[str, float]:
    """Return the percentage of queries whose right candidate is among the best k, as `r<k>`.

    Args:
        scores: (queries, candidates); query i's right candidate is i. Ties count as misses.
        ks: the ranks.

    Example:
        >>> import torch
        >>> recall_at(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), ks=(1, 2))
        {'r1': 50.0, 'r2': 100.0}
    """
    right = scores.diagonal().unsqueeze(1)
    better = (scores >= right).sum(1) - 1
    return {f"r{k}": 100 * float((better < k).double().mean()) for k in ks}
