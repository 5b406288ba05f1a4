"""What a task says of one evaluation: the units to measure, and the numbers that their records come to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeAlias

import numpy as np

from visual_ground.errors import GroundingValueError

# What was measured of one unit, as JSON holds it: ranks, answers, log-likelihoods. Numbers in it are finite.
Record: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """The units of an evaluation of one model, and how they are measured.

    Args:
        units: the id of each unit (a story, a dialog, an image), in the order of the official file.
        measure: given the numbers of a batch of units, returns a record for each. Batches are always the same, so that
            padding never makes a difference between one process and several.
        missing: what is left out, by reason: the names of the images, stories and so on.
        counts: whatever else the report should count, such as the images that are searched.
    """

    units: Sequence[str]
    measure: Callable[[Sequence[int]], Sequence[Record]]
    missing: Mapping[str, Sequence[str]] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)

    def check(self, name: str) -> None:
        """Raise GroundingValueError where there is nothing to measure, saying what was left out, or ids come twice."""
        if not self.units:
            left_out = "; ".join(f"{len(names)} {reason}" for reason, names in self.missing.items() if names)
            raise GroundingValueError(
                f"{name}: nothing is left to measure{f' ({left_out})' if left_out else ''}. Check that data= is the "
                "folder that docs/evaluation.md describes, with the images beside the annotations."
            )
        if twice := [unit for unit, count in Counter(self.units).items() if count > 1]:
            raise GroundingValueError(f"{name}: these ids come twice in the data: {twice[:5]}. Each must come once.")


@dataclass(frozen=True)
class Scores:
    """The numbers of all units.

    A metric is the mean of its values over all units. Intervals resample the units, with all values of a unit together.

    Args:
        values: by metric, for each unit its values: one, several (the ten rounds of a dialog), or none.
        whole: metrics of all units together that are no such mean, such as BLEU; they have no interval.
        files: by name, JSON values to be written beside the report, such as results for an official server.

    Example:
        >>> Scores({"r1": [[100.0], [0.0]], "mrr": [[1.0, 0.5], [0.25]]}).means()
        {'r1': 50.0, 'mrr': 0.5833333333333334}
    """

    values: Mapping[str, Sequence[Sequence[float]]]
    whole: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # A metric that nothing gives a value is no metric: it has neither a mean nor an interval.
        object.__setattr__(self, "values", {name: units for name, units in self.values.items() if any(units)})

    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Return for each unit and metric the sum of its values, and how many they are, both (units, metrics)."""
        sums = [[float(np.sum(values)) for values in units] for units in self.values.values()]
        counts = [[len(values) for values in units] for units in self.values.values()]
        return np.array(sums, dtype=np.float64).T, np.array(counts, dtype=np.float64).T

    def means(self) -> dict[str, float]:
        """Return the metrics: means of `values`, then `whole`; a metric without any value is left out."""
        means = {name: float(np.mean(list(chain.from_iterable(units)))) for name, units in self.values.items()}
        return {**means, **{name: float(value) for name, value in self.whole.items()}}
