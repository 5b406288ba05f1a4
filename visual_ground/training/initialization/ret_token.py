"""`[RET]`'s output embedding, fitted to where captions end or to where pictures belong, without running the LM again.

What the output head reads before `[RET]` and before other tokens does not depend on this embedding, and neither does
the normaliser over the LM's own columns. With these kept, both losses are convex functions of it, and each step of
their descent is one product of a matrix and a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from visual_ground.adapter.adapter import Adapter
from visual_ground.training.losses.retrieval import CaptionLikelihoods

# A bound only: L-BFGS stops by itself if the convex loss falls no further.
MAX_STEPS = 200
# What all places of a picture together weigh, in parts of all other places, and the penalty on the embedding, whose
# inputs have unit mean square: chosen on other wordings (benchmarks/recipe/after_a_picture.py).
WEIGHT, PENALTY = 0.2, 3e-3
# The penalty on the gate's weights, whose inputs have unit norm.
GATE_PENALTY = 1e-4
# The gate opens for so many nats of evidence that a picture is wanted. For each nat less it lowers `[RET]`'s logit by
# the second number, enough to shut it.
EVIDENCE, SLOPE = 0.4, 8.0


@dataclass(frozen=True)
class Places:
    """All places of some answers at which `[RET]` could be said.

    Args:
        states: (n, h), what the output head reads there.
        log_normaliser: (n,), of the LM's own columns.
        is_ret: (n,), whether `[RET]` belongs there.
        gate: (n,), what the gate adds to `[RET]`'s logit there.
    """

    states: Tensor
    log_normaliser: Tensor
    is_ret: Tensor
    gate: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Places]) -> Places:
        """Return the places of all parts."""
        columns = zip(*((part.states, part.log_normaliser, part.is_ret, part.gate) for part in parts), strict=True)
        return cls(*(torch.cat(column) for column in columns))


def fit_ret(adapter: Adapter, likelihoods: CaptionLikelihoods) -> None:
    """Turn `[RET]`'s output embedding to where captions followed by `[RET]` are likeliest, and keep its norm.

    Args:
        adapter: where input and output embedding are tied, the input embedding moves too.
        likelihoods: from `PrefixCache.likelihoods`.
    """
    embedding = adapter.ret_embeddings()[1]
    norm = embedding.detach().norm()
    direction = _minimum(embedding, lambda point: likelihoods.loss(norm * F.normalize(point, dim=0)).mean)
    with torch.no_grad():
        embedding.copy_(norm * F.normalize(direction, dim=0))


def fit_output_embedding(places: Places, weight: float = WEIGHT, penalty: float = PENALTY) -> Tensor:
    r"""Return the embedding (h,) with which `[RET]` is likely where it belongs, and only there.

    .. math::
        \min_w \sum_i c_i\, \ell(y_i, w \cdot h_i + g_i - \log Z_i) + \tfrac{\lambda}{2} \|w\|^2

    :math:`\ell` is the logistic loss, :math:`g_i` what the gate adds, :math:`Z_i` the normaliser of the LM's own
    logits, and the states are in units of their root mean square.

    Args:
        places: where `[RET]` belongs, at one at least, and where not.
        weight: what the places of `[RET]` weigh together, in parts of all others.
        penalty: :math:`\lambda`.
    """
    scale = places.states.square().mean().sqrt()
    states, offset, is_ret = places.states / scale, places.log_normaliser - places.gate, places.is_ret.float()
    weights = torch.where(places.is_ret, weight * (1 - is_ret).sum() / is_ret.sum(), 1.0)
    weights = weights / weights.sum()

    def loss(point: Tensor) -> Tensor:
        losses = F.binary_cross_entropy_with_logits(states @ point - offset, is_ret, weights, reduction="sum")
        return losses + penalty * point.square().sum() / 2

    return _minimum(torch.zeros(states.shape[1]), loss) / scale


def fit_gate(openings: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Fit whether an answer may have pictures, by logistic regression; both kinds of answers weigh the same.

    Args:
        openings: (n, h), what the output head reads where the answers begin.
        wanted: (n,), whether a picture was asked for: once at least, and not always.

    Returns:
        The weight (h,) and the bias () of `Adapter.ret_gate`.
    """
    mean, std = openings.mean(0), openings.std(0, correction=0).clamp_min(1e-6) * openings.shape[1] ** 0.5
    states, target = (openings - mean) / std, wanted.float()
    states = torch.cat([states, torch.ones(len(states), 1)], 1)
    weights = torch.where(wanted, 1 / target.sum(), 1 / (1 - target).sum()) / 2

    def loss(point: Tensor) -> Tensor:
        losses = F.binary_cross_entropy_with_logits(states @ point, target, weights, reduction="sum")
        return losses + GATE_PENALTY * point[:-1].square().sum() / 2

    found = _minimum(torch.zeros(states.shape[1]), loss)
    weight = SLOPE * found[:-1] / std
    return weight, SLOPE * (found[-1] - EVIDENCE) - weight @ mean


def _minimum(start: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Return where a convex loss of one vector is least."""
    point = start.detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([point], max_iter=MAX_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(point)
        torch.autograd.backward(value)
        return value

    with torch.enable_grad():
        optimizer.step(closure)
    return point.detach()
