"""Linear maps found in closed form: ridge regression, and the space that texts and images share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Parts of the inputs' own spread; which of them is right depends on the data, so it is tried on held-out groups.
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
HELD_OUT = 5


@dataclass(frozen=True)
class LinearMap:
    """`inputs @ weight.T + bias`, as in `nn.Linear`.

    Args:
        weight: (outputs, inputs).
        bias: (outputs,).
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, inputs: Tensor) -> Tensor:
        """Map inputs (n, a) to outputs (n, c)."""
        return inputs @ self.weight.T + self.bias

    def unstandardize(self, middle: Tensor, spread: Tensor) -> LinearMap:
        """Return the map of inputs as they are, where this one reads them less `middle` and divided by `spread`."""
        weight = self.weight / spread
        return LinearMap(weight, self.bias - weight @ middle)


def ridge(
    inputs: Tensor,
    targets: Tensor,
    groups: Tensor | None = None,
    score: Callable[[LinearMap, Tensor], float] | None = None,
) -> LinearMap:
    """Fit a linear map by ridge regression.

    The penalty is the number of rows times the one of `PENALTIES` that does best on every fifth group, when fitted to
    the others.

    Args:
        inputs: (n, a), of a like spread in all columns.
        targets: (n, c).
        groups: (n,), equal where two rows are about the same thing; every row by itself where None.
        score: how well a map does on the rows of a mask (n,) bool, more is better; minus the squared error where None.

    Example:
        >>> inputs = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> ridge(inputs, 2 * inputs).weight.diagonal().round(decimals=1).tolist()
        [2.0, 2.0, 2.0]
    """
    groups = torch.arange(len(inputs)) if groups is None else groups.cpu()
    number = _by_appearance(groups)
    held = (number % HELD_OUT == HELD_OUT - 1).to(inputs.device)
    penalty = PENALTIES[0]
    if bool(held.any()):
        fitted = _fit(inputs[~held], targets[~held], PENALTIES)
        scores = [score(one, held) if score else -_squared_error(one, inputs[held], targets[held]) for one in fitted]
        penalty = PENALTIES[scores.index(max(scores))]
    return _fit(inputs, targets, (penalty,))[0]


def _by_appearance(groups: Tensor) -> Tensor:
    """Number groups in the order in which they come, for their own numbers may tell where files lie."""
    number = torch.unique(groups, return_inverse=True)[1]
    places = torch.arange(len(groups))
    first = torch.full((int(number.max()) + 1,), len(groups)).scatter_reduce(0, number, places, "amin")
    return first.argsort().argsort()[number]


def _squared_error(fitted: LinearMap, inputs: Tensor, targets: Tensor) -> float:
    return float((fitted(inputs) - targets).square().mean())


def _fit(inputs: Tensor, targets: Tensor, penalties: Sequence[float]) -> list[LinearMap]:
    centre, middle = inputs.mean(0), targets.mean(0)
    own, aims = inputs - centre, targets - middle
    # As many equations as rows or as columns, whichever are fewer.
    few = len(own) < own.shape[1]
    values, vectors = torch.linalg.eigh(own @ own.T if few else own.T @ own)
    products = vectors.T @ (aims if few else own.T @ aims)
    maps = []
    for penalty in penalties:
        solution = vectors @ (products / (values.clamp_min(0) + penalty * len(inputs))[:, None])
        weight = (own.T @ solution if few else solution).T
        maps.append(LinearMap(weight, middle - weight @ centre))
    return maps


def mean_and_std(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the spread, which is never zero, of each column of (n, a)."""
    return columns.mean(0), columns.std(0, correction=0) + 1e-6


def reduced_rank_regression(
    texts: Tensor, images: Tensor, width: int, groups: Tensor | None = None
) -> tuple[LinearMap, LinearMap]:
    """Return maps of texts and of images into the space where what images tell about texts is seen best.

    Reduced-rank regression: texts are predicted from images by `ridge`, and both are seen along the principal
    directions of the predictions. Where texts have fewer dimensions than `width`, the last ones are zero.

    Args:
        texts: (n, a).
        images: (n, f), of a like spread in all columns; row i belongs to text i.
        width: dimensions of the shared space.
        groups: (n,), as in `ridge`.
    """
    middle, spread = mean_and_std(texts)
    found = ridge(images, (texts - middle) / spread, groups)
    predicted = found(images)
    directions = _principal(predicted.T @ predicted)[:width]
    if missing := width - len(directions):
        directions = torch.cat([directions, directions.new_zeros(missing, directions.shape[1])])
    text_map = LinearMap(directions / spread, -(directions / spread) @ middle)
    return text_map, LinearMap(directions @ found.weight, directions @ found.bias)


def _principal(products: Tensor) -> Tensor:
    """Return the eigenvectors of a symmetric matrix as rows, the largest first.

    Each looks to where its largest entry is positive, and those that rounding alone tells from others are zero, so
    that rounding does not decide which of many spaces equally good is found.
    """
    values, vectors = torch.linalg.eigh(products.double())
    found = vectors.flip(1).T
    largest = found.gather(1, found.abs().argmax(1, keepdim=True))
    told = values.flip(0) > 1e-6 * values[-1]
    return (found * largest.sign() * told[:, None]).to(products)
