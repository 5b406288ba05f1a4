"""The closed form: texts' and images' maps into one space from second moments alone.

With texts t and images x, each less its mean, and their moments Ctt, Cxx, Ctx:

    P = (Ctt + a)^-p,  R = (Cxx + b)^-1/2,  U S V' = svd(P Ctx R)
    text map  S^alpha U' P,   image map  S^beta V' R

p = 0, alpha = 0, beta = 1 is reduced-rank ridge regression from images to texts (`closed_form.shared_space`); p = 1/2
is canonical correlation analysis with shrinkage. `a` and `b` are in parts of the mean eigenvalue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Moments:
    """Sums from which everything is solved: exact, additive, and of a size that does not depend on the pairs."""

    count: float
    text: Tensor
    image: Tensor
    tt: Tensor
    xx: Tensor
    tx: Tensor

    @classmethod
    def of(cls, texts: Tensor, images: Tensor) -> Moments:
        t, x = texts.double(), images.double()
        return cls(float(len(t)), t.sum(0), x.sum(0), t.T @ t, x.T @ x, t.T @ x)

    def take(self, texts: Tensor, images: Tensor) -> None:
        """Add rows in place, so that memory neither grows nor is cut to pieces."""
        t, x = texts.double(), images.double()
        self.count += len(t)
        self.text += t.sum(0)
        self.image += x.sum(0)
        self.tt.addmm_(t.T, t)
        self.xx.addmm_(x.T, x)
        self.tx.addmm_(t.T, x)

    def __add__(self, other: Moments) -> Moments:
        mine, its = vars(self), vars(other)
        return Moments(**{name: mine[name] + its[name] for name in mine})

    def __sub__(self, other: Moments) -> Moments:
        mine, its = vars(self), vars(other)
        return Moments(**{name: mine[name] - its[name] for name in mine})

    def central(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return both means and the three central second moments."""
        n = self.count
        mt, mx = self.text / n, self.image / n
        return (
            mt,
            mx,
            self.tt / n - torch.outer(mt, mt),
            self.xx / n - torch.outer(mx, mx),
            self.tx / n - torch.outer(mt, mx),
        )


@dataclass(frozen=True)
class Form:
    """Which closed form."""

    p: float = 0.5
    a: float = 0.1
    b: float = 0.1
    alpha: float = 0.5
    beta: float = 0.5
    q: int = 256
    diagonal: bool = True  # standardise each text dimension first


@dataclass
class Maps:
    text: Tensor
    text_mean: Tensor
    image: Tensor
    image_mean: Tensor

    def texts(self, states: Tensor) -> Tensor:
        return F.normalize((states - self.text_mean) @ self.text.T, dim=-1)

    def images(self, features: Tensor) -> Tensor:
        return F.normalize((features - self.image_mean) @ self.image.T, dim=-1)


class Solver:
    """Solves many forms from the same moments; eigenvectors are found once."""

    def __init__(self, moments: Moments, diagonal: bool = True, within: Tensor | None = None) -> None:
        """`within`: a second moment to whiten texts by, instead of their own."""
        self.mt, self.mx, tt, xx, tx = moments.central()
        self.ts = tt.diagonal().clamp_min(1e-12).sqrt() if diagonal else torch.ones(len(tt)).double()
        self.xs = xx.diagonal().clamp_min(1e-12).sqrt()
        white = tt if within is None else within
        self.tt = torch.linalg.eigh(white / self.ts[:, None] / self.ts)
        self.xx = torch.linalg.eigh(xx / self.xs[:, None] / self.xs)
        self.tx = tx / self.ts[:, None] / self.xs
        self.tx_both = self.tt[1].T @ self.tx @ self.xx[1]

    def solve(self, form: Form) -> Maps:
        lt, et = self.tt
        lx, ex = self.xx
        lt, lx = lt.clamp_min(0), lx.clamp_min(0)
        pt = (lt + form.a * lt.mean()) ** -form.p
        rx = (lx + form.b * lx.mean()) ** -0.5
        m = pt[:, None] * self.tx_both * rx
        # The smaller side's eigenvectors give the SVD: m is (d, f) with d < f as a rule.
        values, u = torch.linalg.eigh(m @ m.T)
        order = values.argsort(descending=True)[: form.q]
        s, u = values[order].clamp_min(1e-20).sqrt(), u[:, order]
        v = (m.T @ u) / s
        text = (s**form.alpha)[:, None] * ((u.T * pt) @ et.T) / self.ts
        image = (s**form.beta)[:, None] * ((v.T * rx) @ ex.T) / self.xs
        return Maps(text.float(), self.mt.float(), image.float(), self.mx.float())


def unit(states: Tensor) -> Tensor:
    """Scale states to unit mean square, as the adapter reads them."""
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-6)


def ranks(scores: Tensor, own: Tensor | None = None) -> Tensor:
    """Return how many candidates are not worse than the right one, (queries,)."""
    own = torch.arange(len(scores)) if own is None else own
    right = scores[torch.arange(len(scores)), own][:, None]
    return (scores >= right).sum(1) - 1


def recall(found: Tensor) -> list[float]:
    return [round(100 * float((found < k).double().mean()), 1) for k in (1, 5, 10)]


def folds(groups: Sequence[int], count: int = 5, seed: int = 0) -> Tensor:
    """Give each group a fold at random; groups of the same number are together."""
    number = torch.unique(torch.tensor(groups), return_inverse=True)[1]
    order = torch.randperm(int(number.max()) + 1, generator=torch.Generator().manual_seed(seed))
    return (order % count)[number]
