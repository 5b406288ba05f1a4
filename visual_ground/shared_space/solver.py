r"""A space that texts and images share, in closed form from second moments alone, so that pairs may come as a stream.

Canonical correlation analysis with partly whitened sides. Texts :math:`t` and images :math:`x` are standardised, with
the moments :math:`C_{tt}, C_{xx}, C_{tx}`, and :math:`c_t, c_x` are the mean eigenvalues of the first two:

.. math::
    P = (C_{tt} + a c_t I)^{-1/2}, \quad R = (C_{xx} + b c_x I)^{-1/2}, \quad U S V^\top = P C_{tx} R, \quad
    \text{text}(t) = S^{1/2} U^\top P t, \quad \text{image}(x) = S^{1/2} V^\top R x

Computed in float64, which Apple's MPS lacks: move tensors to the CPU first. What else was tried, and by how much it
was worse, is in docs/recipe.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from visual_ground.errors import GroundingValueError
from visual_ground.shared_space.moments import Moments


@dataclass(frozen=True)
class Penalties:
    """What is added to the eigenvalues of texts' and images' moments, in parts of their means: a and b."""

    text: float = 1.0
    image: float = 3.0


# Below this part of the largest one, a singular value is a rounding error.
SMALLEST = 1e-7


def largest_singular(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest singular values (n,) of a matrix (a, f) with their left (n, a) and right (n, f) vectors.

    They are found as eigenvalues of the smaller of its two Gram matrices, in a third of the time of a singular value
    decomposition. Directions of values that are rounding errors are arbitrary: these values become zero.

    Args:
        matrix: in float64.
        count: n, or fewer if the matrix has fewer.
    """
    if len(matrix) > matrix.shape[1]:
        singular, right, left = largest_singular(matrix.T, count)
        return singular, left, right
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T)
    singular = squares.flip(0)[:count].clamp_min(0).sqrt()
    singular = torch.where(singular > SMALLEST * singular[0], singular, 0)
    left = vectors.T.flip(0)[:count]
    right = torch.where(singular > 0, 1 / singular, 0)[:, None] * (left @ matrix)
    return singular, left, right


class Solver:
    """Solves for any penalties from the same moments; the eigenvectors are found once."""

    def __init__(self, moments: Moments) -> None:
        count = moments.count
        self.means = moments.text / count, moments.image / count
        text, image = self.means
        centred = (
            moments.text_text / count - torch.outer(text, text),
            moments.image_image / count - torch.outer(image, image),
        )
        self._stds = []
        for name, moment in zip(("texts", "images"), centred, strict=True):
            variances = moment.diagonal()
            if not bool((variances > 1e-12).any()):
                raise GroundingValueError(
                    f"All {name} have the same features, so that nothing tells one from another. Check the dataset's "
                    "columns, and that the encoder gives different features for different inputs."
                )
            # A constant column says nothing, and is divided by anything but zero.
            self._stds.append(torch.where(variances > 1e-12, variances, torch.inf).sqrt())
        self._eigen = [
            torch.linalg.eigh(moment / std[:, None] / std) for moment, std in zip(centred, self._stds, strict=True)
        ]
        cross = (moments.text_image / count - torch.outer(text, image)) / self._stds[0][:, None] / self._stds[1]
        self._cross = self._eigen[0][1].T @ cross @ self._eigen[1][1]

    def solve(self, width: int, penalties: Penalties) -> tuple[Tensor, Tensor]:
        """Return the weights of texts (width, a) and of images (width, f), for raw inputs less their means."""
        roots = []
        for (values, _), penalty in zip(self._eigen, (penalties.text, penalties.image), strict=True):
            values = values.clamp_min(0)
            roots.append((values + penalty * values.mean()).rsqrt())
        singular, *both = largest_singular(roots[0][:, None] * self._cross * roots[1], width)
        sides = []
        for vectors, root, (_, basis), std in zip(both, roots, self._eigen, self._stds, strict=True):
            weight = singular.sqrt()[:, None] * ((vectors * root) @ basis.T) / std
            sides.append(F.pad(weight, (0, 0, 0, width - len(weight))))
        # Singular vectors are defined up to their sign: that of the largest entry is made positive on every machine.
        sign = sides[0].gather(1, sides[0].abs().argmax(1, keepdim=True)).sign()
        return sides[0] * sign, sides[1] * sign

    def regress(self, penalty: float) -> Tensor:
        """Return the ridge regression's weights (f, a) from texts to images, both less their means."""
        (values, text_basis), (_, image_basis) = self._eigen
        values = values.clamp_min(0)
        inner = self._cross / (values + penalty * values.mean())[:, None]
        weight: Tensor = text_basis @ inner @ image_basis.T  # From standardised texts to standardised images.
        text_std, image_std = self._stds
        image_std = torch.where(image_std.isinf(), 0, image_std)
        scaled: Tensor = (weight * image_std).T / text_std
        return scaled
