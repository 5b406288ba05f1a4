"""Ridge regression in closed form.

It solves a symmetric eigenproblem, which Apple's MPS cannot: move tensors to the CPU first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Per example, for standardised inputs. The right one depends on the data, so it is chosen on held-out groups; steps of
# about 3 cover what matters, as the held-out error is flat around its minimum.
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
# Every fifth group is held out, as in one fold of five-fold cross-validation.
FOLDS = 5
# Keeps the standard deviation of a constant column away from zero.
EPSILON = 1e-6


@dataclass(frozen=True)
class LinearMap:
    """`inputs @ weight.T + bias`, as in `nn.Linear`.

    Args:
        weight: (c, a).
        bias: (c,).
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, inputs: Tensor) -> Tensor:
        """Map inputs (n, a) to outputs (n, c)."""
        return inputs @ self.weight.T + self.bias

    def unstandardize(self, mean: Tensor, std: Tensor) -> LinearMap:
        """Return the map that takes raw inputs, where this one takes `(inputs - mean) / std`.

        Args:
            mean: (a,).
            std: (a,).
        """
        weight = self.weight / std
        return LinearMap(weight, self.bias - weight @ mean)


def ridge(
    inputs: Tensor,
    targets: Tensor,
    groups: Tensor | None = None,
    score: Callable[[LinearMap, Tensor], float] | None = None,
) -> LinearMap:
    r"""Fit a linear map by ridge regression, with the penalty that does best on held-out groups.

    .. math::
        \min_{W, b} \sum_i \|W x_i + b - y_i\|^2 + n \lambda \|W\|^2

    :math:`\lambda` is the one of `PENALTIES` whose map, fitted to the other groups, scores best on every fifth group.

    Args:
        inputs: (n, a), standardised or with columns of like scale.
        targets: (n, c).
        groups: (n,), equal for examples of the same thing, which are held out together; None: each its own group.
        score: rates a map on the examples of a mask (n,) bool, higher is better; minus the mean squared error if None.

    Returns:
        The map, fitted to all examples.

    Example:
        >>> inputs = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> ridge(inputs, 2 * inputs).weight.diagonal().round(decimals=1).tolist()
        [2.0, 2.0, 2.0]
    """
    groups = torch.arange(len(inputs)) if groups is None else groups.cpu()
    held_out = (_by_appearance(groups) % FOLDS == FOLDS - 1).to(inputs.device)
    penalty = PENALTIES[0]
    if bool(held_out.any()):
        maps = solve_ridge(inputs[~held_out], targets[~held_out], PENALTIES)
        scores = [
            score(one, held_out) if score else -_squared_error(one, inputs[held_out], targets[held_out]) for one in maps
        ]
        penalty = PENALTIES[scores.index(max(scores))]
    return solve_ridge(inputs, targets, (penalty,))[0]


def _by_appearance(groups: Tensor) -> Tensor:
    """Number groups in the order of their first examples: their own numbers may follow where files are stored."""
    number = torch.unique(groups, return_inverse=True)[1]
    positions = torch.arange(len(groups))
    first = torch.full((int(number.max()) + 1,), len(groups)).scatter_reduce(0, number, positions, "amin")
    return first.argsort().argsort()[number]


def _squared_error(fitted: LinearMap, inputs: Tensor, targets: Tensor) -> float:
    return float((fitted(inputs) - targets).square().mean())


def solve_ridge(
    inputs: Tensor, targets: Tensor, penalties: Sequence[float], fit_intercept: bool = True
) -> list[LinearMap]:
    """Return the ridge regression for each penalty; one eigendecomposition serves them all.

    Args:
        inputs: (n, a).
        targets: (n, c).
        penalties: each is multiplied by n.
        fit_intercept: whether there is a bias, which is not penalised; else it is zero.
    """
    input_mean, target_mean = inputs.mean(0), targets.mean(0)
    if not fit_intercept:
        input_mean, target_mean = torch.zeros_like(input_mean), torch.zeros_like(target_mean)
    centred, centred_targets = inputs - input_mean, targets - target_mean
    # The primal form has as many equations as columns, the dual form as many as examples: take the smaller one.
    is_dual = len(centred) < centred.shape[1]
    values, vectors = torch.linalg.eigh(centred @ centred.T if is_dual else centred.T @ centred)
    products = vectors.T @ (centred_targets if is_dual else centred.T @ centred_targets)
    maps = []
    for penalty in penalties:
        solution = vectors @ (products / (values.clamp_min(0) + penalty * len(inputs))[:, None])
        weight = (centred.T @ solution if is_dual else solution).T
        maps.append(LinearMap(weight, target_mean - weight @ input_mean))
    return maps


def mean_and_std(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (a,) and the standard deviation (a,), which is never zero, of the columns of (n, a)."""
    return columns.mean(0), columns.std(0, correction=0) + EPSILON
