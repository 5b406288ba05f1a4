"""Confidence intervals by the bootstrap: the units are drawn again and again, with replacement."""

from __future__ import annotations

import numpy as np

CONFIDENCE = 95.0  # percent


def bootstrap_intervals(sums: np.ndarray, counts: np.ndarray, samples: int = 1000, seed: int = 0) -> np.ndarray:
    """Return the percentile intervals of means whose values come in units, (metrics, 2).

    A metric is the sum of its values over their number. Each sample draws as many units as there are; all metrics
    share the draws.

    Args:
        sums: (units, metrics), the sum of each unit's values.
        counts: (units, metrics), how many values each unit has.
        samples: how often the units are drawn.
        seed: of the draws.

    Example:
        >>> ones = np.ones((4, 1))
        >>> bootstrap_intervals(ones, ones).tolist()
        [[1.0, 1.0]]
    """
    generator, number = np.random.default_rng(seed), len(sums)
    means = np.empty((samples, sums.shape[1]))
    for sample in range(samples):
        drawn = np.bincount(generator.integers(0, number, number), minlength=number)
        total = drawn @ counts
        # A draw may hold none of the few units that have values.
        means[sample] = np.divide(drawn @ sums, total, out=np.full_like(total, np.nan), where=total > 0)
    tail = (100 - CONFIDENCE) / 2
    intervals: np.ndarray = np.nanpercentile(means, [tail, 100 - tail], axis=0).T
    return intervals
