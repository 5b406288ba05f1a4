"""Linear layers in closed form: ridge regression, with a penalty that is chosen on held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PENALTIES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
FOLDS = 5


@dataclass(frozen=True)
class LinearMap:
    """A linear layer's weight (o, i) and bias (o,)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, inputs: Tensor) -> Tensor:
        """Map inputs (n, i) to outputs (n, o)."""
        return inputs @ self.weight.T + self.bias


class Ridge:
    r"""Ridge regression with a bias, solved for any penalty from one decomposition.

    .. math::
        W = Y^\top X (X^\top X + \lambda \bar s I)^{-1}

    with X and Y less their means and :math:`\bar s` the mean eigenvalue of :math:`X^\top X` over the rank that n rows
    can have, so that a penalty means the same for any LM and any number of rows.

    Args:
        inputs: (n, i).
        targets: (n, o).

    Example:
        >>> inputs = torch.tensor([[0.0], [1.0], [2.0]])
        >>> fitted = Ridge(inputs, 3 * inputs + 1).solve(1e-6)
        >>> round(float(fitted.weight), 3), round(float(fitted.bias), 3)
        (3.0, 1.0)
    """

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        x, y = inputs.double(), targets.double()
        self.input_mean, self.target_mean = x.mean(0), y.mean(0)
        x, y = x - self.input_mean, y - self.target_mean
        # Of the two Gram matrices the smaller one: as many equations as rows or as columns.
        self.dual = len(x) < x.shape[1]
        values, self.vectors = torch.linalg.eigh(x @ x.T if self.dual else x.T @ x)
        self.values = values.clamp_min(0)
        self.turned = self.vectors.T @ (y if self.dual else x.T @ y)
        self.inputs = x if self.dual else None

    def solve(self, penalty: float) -> LinearMap:
        """Return the layer for a penalty, in parts of the mean eigenvalue."""
        scaled = self.turned / (self.values + penalty * self.values.mean()).clamp_min(1e-12)[:, None]
        solution = self.vectors @ scaled
        weight = (solution if self.inputs is None else self.inputs.T @ solution).T
        return LinearMap(weight.float(), (self.target_mean - weight @ self.input_mean).float())


def fit_ridge(
    inputs: Tensor,
    targets: Tensor,
    groups: Tensor,
    score: Callable[[LinearMap, Tensor], float],
    penalties: Sequence[float] = PENALTIES,
) -> LinearMap:
    """Return the ridge layer with the penalty that scores best on rows it was not fitted to.

    Args:
        inputs: (n, i).
        targets: (n, o).
        groups: (n,) whole numbers; rows of one group are held out together.
        score: how good a layer is on the rows of a mask (n,) bool; more is better.
        penalties: what to choose from.
    """
    names = groups.unique()
    folds = min(FOLDS, len(names))
    if folds < 2:
        return Ridge(inputs, targets).solve(max(penalties))
    totals = dict.fromkeys(penalties, 0.0)
    shuffled = names[torch.randperm(len(names), generator=torch.Generator().manual_seed(0))]
    for fold in range(folds):
        held = torch.isin(groups, shuffled[fold::folds])
        ridge = Ridge(inputs[~held], targets[~held])
        for penalty in penalties:
            totals[penalty] += score(ridge.solve(penalty), held)
    return Ridge(inputs, targets).solve(max(totals, key=lambda penalty: totals[penalty]))
