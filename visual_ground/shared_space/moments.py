"""Second moments of texts and images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Sums over pairs less a fixed point: exact, additive, and of a size that does not depend on how many there are."""

    count: float
    text: Tensor
    image: Tensor
    text_text: Tensor
    image_image: Tensor
    text_image: Tensor

    @classmethod
    def zeros(cls, a: int, f: int) -> Moments:
        """Return the moments of no texts (0, a) and images (0, f)."""
        shapes = (a,), (f,), (a, a), (f, f), (a, f)
        return cls(0.0, *(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def add(self, texts: Tensor, images: Tensor) -> None:
        """Add pairs in place, so that memory does not grow."""
        self.count += len(texts)
        self.text += texts.sum(0)
        self.image += images.sum(0)
        self.text_text.addmm_(texts.T, texts)
        self.image_image.addmm_(images.T, images)
        self.text_image.addmm_(texts.T, images)

    def plus(self, other: Moments, sign: int = 1) -> Moments:
        """Return the moments of both, or, with a sign of -1, of those without the other's."""
        own, its = vars(self), vars(other)
        return Moments(**{name: own[name] + sign * its[name] for name in own})


def summed(parts: Sequence[Moments]) -> Moments:
    """Return the moments of all parts."""
    total = parts[0]
    for part in parts[1:]:
        total = total.plus(part)
    return total
