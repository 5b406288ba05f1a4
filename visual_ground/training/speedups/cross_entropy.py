"""Cross entropy a few labels at a time, whose gradients are computed within the forward pass.

Logits are wide: 400 labels of a vocabulary of 50,000 are 80 MB in float32, and as much again for every copy that a
plain cross entropy and its gradient make. Here the head runs over a few labels, their loss and its gradient are
computed at once, and the logits are dropped. The same is done with whole parts of a batch (`sum_of_parts`): where a
loss is a sum, every part can run forward and backward before the next, at no cost but one part's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from visual_ground.model import GroundedModel

# Bytes of float32 logits that exist at once: 32 MB, or 167 labels of 50,000 columns.
LOGIT_BYTES = 2**25
# The head runs over so many labels at least, however wide the vocabulary, because each part reads all its weights.
MIN_LABELS = 16

Part = TypeVar("Part")


def sum_of_parts(
    loss_of: Callable[[Part, Tensor], Tensor], parts: Iterable[Part], shared: Tensor, parameters: Sequence[Tensor] = ()
) -> Tensor:
    """Return the sum of `loss_of(part, shared)`, whose gradients are computed part by part, within this call.

    Args:
        loss_of: a scalar from a part and `shared`.
        parts: the parts.
        shared: what all parts read.
        parameters: further leaves that `loss_of` reads, each once; no other tensor gets a gradient.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> sum_of_parts(lambda i, shared: shared[i] ** 2, [0, 1], x).backward()
        >>> x.grad
        tensor([2., 4.])
    """
    if not torch.is_grad_enabled():
        return torch.stack([loss_of(part, shared) for part in parts]).sum()
    total: Tensor = _SumOfParts.apply(loss_of, parts, shared, *parameters)
    return total


class _SumOfParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loss_of: Callable[[Any, Tensor], Tensor], parts: Iterable[Any], shared: Tensor, *parameters: Tensor
    ) -> Tensor:
        # Detached from what made it, through which each part would otherwise run backward again.
        leaf = shared.detach().requires_grad_(shared.requires_grad)
        inputs = [leaf, *parameters]
        trained = [tensor for tensor in inputs if tensor.requires_grad]
        sums = {id(tensor): torch.zeros_like(tensor) for tensor in trained}
        total = torch.zeros((), device=shared.device)
        for part in parts:
            with torch.enable_grad():
                loss = loss_of(part, leaf)
                gradients = torch.autograd.grad(loss, trained, allow_unused=True) if trained else ()
            for tensor, gradient in zip(trained, gradients, strict=True):
                if gradient is not None:
                    sums[id(tensor)].add_(gradient)
            total = total + loss.detach().to(total.device)
        ctx.save_for_backward(*(sums.get(id(tensor)) for tensor in inputs))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if saved is None else saved * gradient.to(saved) for saved in ctx.saved_tensors)


def ret_parameters(model: GroundedModel) -> list[Tensor]:
    """Return `[RET]`'s input and output embedding, each tensor once."""
    return list(dict.fromkeys(model.adapter.ret_embeddings()))


def _chunks(model: GroundedModel, count: int) -> list[slice]:
    size = max(MIN_LABELS, LOGIT_BYTES // (4 * model.frozen_lm.vocabulary.num_columns))
    return [slice(i, i + size) for i in range(0, count, size)]


def summed_cross_entropy(model: GroundedModel, states: Tensor, targets: Tensor) -> Tensor:
    """Return the summed cross entropy of labels, without all their logits at once.

    Args:
        model: the grounded model, whose LM must do nothing to its head's output.
        states: (n, h), what the head reads.
        targets: (n,), the labels.
    """

    def loss_of(chunk: slice, states: Tensor) -> Tensor:
        logits = model.frozen_lm.head_logits(states[chunk])
        return F.cross_entropy(logits, targets[chunk].to(logits.device), reduction="sum")

    return sum_of_parts(loss_of, _chunks(model, len(states)), states, ret_parameters(model))


@torch.no_grad()
def normalisers_without_ret(model: GroundedModel, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log normaliser over all columns but `[RET]`'s, and the targets' logits, each float32 (n,).

    Args:
        model: as in `summed_cross_entropy`.
        states: (n, h).
        targets: (n,); for `[RET]` the logit is -inf.
    """
    normalisers, target_logits = [], []
    for chunk in _chunks(model, len(states)):
        logits = model.frozen_lm.head_logits(states[chunk])
        logits[:, model.ret_token_id] = float("-inf")
        normalisers.append(logits.logsumexp(-1))
        target_logits.append(logits.gather(-1, targets[chunk, None].to(logits.device))[:, 0])
    return torch.cat(normalisers), torch.cat(target_logits)
