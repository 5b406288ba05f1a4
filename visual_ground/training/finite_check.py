"""`FiniteCheck`: stops a run before a loss or a gradient that is not finite changes the adapter."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from visual_ground.errors import GroundingValueError


class FiniteCheck:
    """Collects the losses of an optimizer step's batches, and checks them and the gradients together.

    Asking whether a tensor on a GPU is finite makes the CPU wait for all work that was queued there. So nothing is
    asked after each loss or each backward pass: one question is asked per optimizer step, over all losses and
    gradients, right before the optimizer reads the gradients. Nothing but the optimizer writes the adapter, so this is
    as strict as asking earlier.

    Example:
        >>> check = FiniteCheck()
        >>> check.add(torch.tensor(1.5), torch.tensor([3, 4]))
        >>> check.run([torch.zeros(2)], step=7)
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Forget what was noted."""
        self._losses: list[Tensor] = []
        self._examples: list[Tensor] = []

    def add(self, loss: Tensor, examples: Tensor) -> None:
        """Note the loss () of a batch, and the numbers (b,) of its examples in the dataset."""
        self._losses.append(loss.detach())
        self._examples.append(examples)

    def run(self, gradients: Iterable[Tensor | None], step: int) -> None:
        """Raise, naming step and examples, where a loss since the last call or a gradient is not finite."""
        losses, examples = self._losses, self._examples
        self.start()
        # The largest absolute value is finite exactly where all values are. (A 2-norm could overflow.) Clipping, which
        # comes before this, keeps what is not finite so: 0 times infinity is NaN.
        largest = [torch.linalg.vector_norm(gradient, ord=math.inf) for gradient in gradients if gradient is not None]
        values = [value.float() for value in (*losses, *largest)]
        if not values or bool(torch.stack([value.to(values[-1].device) for value in values]).isfinite().all()):
            return
        for loss, numbers in zip(losses, examples, strict=True):
            if not bool(loss.isfinite()):
                raise GroundingValueError(_message(f"The loss became {float(loss)}", step, numbers))
        raise GroundingValueError(_message("A gradient is not finite", step, torch.cat(examples)))


def _message(problem: str, step: int, examples: Tensor) -> str:
    return (
        f"{problem} at step {step}, in the batch of examples {examples.tolist()}. Training stopped before this step; "
        "the adapter and the last checkpoint are good. Lower the learning rate, or look at these examples."
    )
