"""`Evaluator`: what an evaluation is to the trainer, the command line and adapter cards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from visual_ground.errors import GroundingTypeError, GroundingValueError
from visual_ground.model import GroundedModel


@runtime_checkable
class Evaluator(Protocol):
    """Anything that maps a grounded model to metrics; it needs no base class.

    Attributes:
        name: tells this evaluator's metrics from another's in one run.
        primary_metric: the metric that decides between two models, one of those returned.
    """

    name: str
    primary_metric: str

    def __call__(self, model: GroundedModel) -> dict[str, float]:
        """Return the metrics by name. In distributed training every process calls this, and gets the same."""
        ...


def as_evaluators(evaluator: Evaluator | Sequence[Evaluator] | None) -> list[Evaluator]:
    """Return one evaluator, several or none as a list.

    Raises:
        GroundingTypeError: not an `Evaluator`.
        GroundingValueError: two of the same name, or one without a name.
    """
    evaluators = [] if evaluator is None else list(evaluator) if isinstance(evaluator, Sequence) else [evaluator]
    for one in evaluators:
        if not isinstance(one, Evaluator):
            raise GroundingTypeError(
                f"An evaluator is called with the model and has a name and a primary_metric, got {type(one).__name__}; "
                "see visual_ground.evaluation.Evaluator."
            )
    names = [one.name for one in evaluators]
    if "" in names or len(set(names)) < len(names):
        raise GroundingValueError(f"Each evaluator needs a name of its own, got {names}; pass name= to each.")
    return evaluators


def run_evaluators(model: GroundedModel, evaluators: Sequence[Evaluator]) -> dict[str, float]:
    """Return all metrics as `<name>_<metric>`, and the primary one, which must be there, also as `<name>`."""
    results: dict[str, float] = {}
    for evaluator in evaluators:
        metrics = evaluator(model)
        if evaluator.primary_metric not in metrics:
            raise GroundingValueError(
                f"The evaluator {evaluator.name!r} returned {sorted(metrics)}, without its primary_metric "
                f"{evaluator.primary_metric!r}. Return that too, or name one of these as primary_metric."
            )
        results[evaluator.name] = metrics[evaluator.primary_metric]
        results |= {f"{evaluator.name}_{metric}": value for metric, value in metrics.items()}
    return results
