"""The metrics of composed retrieval, in which an image and a wish to change it look for another image.

A ranking is best first. Where a right and a wrong image have the same score, the wrong one comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import numpy as np

from visual_ground.errors import GroundingValueError


def ranking(
    scores: Sequence[float] | np.ndarray, names: Sequence[str], right: AbstractSet[str], without: AbstractSet[str]
) -> list[str]:
    """Return names by their scores, best first.

    Args:
        scores: one for each name.
        names: of the images that are searched.
        right: those that are right; after wrong ones of the same score.
        without: those that are taken out, such as the query's own image.

    Raises:
        GroundingValueError: a score that is not a number, or nothing to search.

    Example:
        >>> ranking([0.5, 0.9, 0.5], ["a", "b", "c"], {"a"}, without={"b"})
        ['c', 'a']
    """
    values = np.asarray(scores, dtype=np.float64)
    if np.isnan(values).any():
        wrong = [names[i] for i in np.flatnonzero(np.isnan(values))[:5]]
        raise GroundingValueError(
            f"The scores of {int(np.isnan(values).sum())} of {len(names)} images are not numbers, such as those of "
            f"{wrong}. Look at the adapter's weights and at the dtype."
        )
    order = np.lexsort((np.array([name in right for name in names]), -values))
    ranked = [names[i] for i in order if names[i] not in without]
    if not ranked:
        raise GroundingValueError(f"There is no image to search: {len(names)} were given, {len(without)} taken out.")
    return ranked


def recalls(ranked: Sequence[str], right: AbstractSet[str], ks: Sequence[int]) -> dict[str, float]:
    """Return for each k whether a right one is among the best k, as 100 or 0, by `r<k>`.

    Example:
        >>> recalls(["b", "a"], {"a"}, (1, 2))
        {'r1': 0.0, 'r2': 100.0}
    """
    first = next((i for i, name in enumerate(ranked) if name in right), len(ranked))
    return {f"r{k}": 100.0 * (first < k) for k in ks}


def average_precision_at(ranked: Sequence[str], right: AbstractSet[str], k: int) -> float:
    """Return AP@k, from 0 to 1: the sum of the precisions at each hit among the best k, over min(k, right ones).

    Raises:
        GroundingValueError: nothing is right, or a name comes twice.

    Example:
        >>> round(average_precision_at(["x", "a", "b"], {"a", "b"}, 5), 4)
        0.5833
    """
    if not right or len(set(ranked)) < len(ranked):
        raise GroundingValueError(
            f"AP@{k} needs at least one right image and a ranking without repetitions, got {len(right)} right ones and "
            f"{len(ranked) - len(set(ranked))} repetitions."
        )
    hits = [name in right for name in ranked[:k]]
    return sum(sum(hits[: i + 1]) / (i + 1) for i, hit in enumerate(hits) if hit) / min(k, len(right))
