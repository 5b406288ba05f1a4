"""`MomentAccumulator`: takes pairs as a stream, and finds the space that their texts and images share."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from visual_ground.errors import GroundingValueError
from visual_ground.regression import LinearMap
from visual_ground.shared_space.moments import Moments, summed
from visual_ground.shared_space.solver import Penalties, Solver

logger = logging.getLogger(__name__)

# Folds of cross-validation. The groups that are held out to choose penalties are the `SAMPLED_GROUPS` of each fold with
# the smallest hashes, so that neither memory nor the order of the pairs matters.
FOLDS, SAMPLED_GROUPS = 5, 256
# Fewer held-out groups say nothing about recalls.
MIN_HELD_OUT = 10
# Recalls are counted at these ranks.
RANKS = (1, 5, 10)
# The middle of the candidates is what was best on the study's data; it is taken if nothing can be held out.
DEFAULT = Penalties()
# If only the text side is fitted, its penalty is that of a ridge regression.
TEXT_CANDIDATES = tuple(Penalties(text) for text in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0))
CANDIDATES = tuple(Penalties(text, image) for text, image in product((0.3, 1.0, 3.0), (1.0, 3.0, 10.0)))


@dataclass(frozen=True)
class SharedSpace:
    """The maps of texts (n, a) and of images (n, f) into one space (n, q), and the penalties they were fitted with."""

    text: LinearMap
    image: LinearMap
    penalties: Penalties


class MomentAccumulator:
    """Takes texts and their images a part at a time; memory does not depend on how many come.

    A group is in one fold, by its hash, however often and whenever it comes.

    Args:
        fixed_images: images are unit vectors of a space that stays as it is, and only texts are mapped into it.

    Example:
        >>> pairs = MomentAccumulator()
        >>> numbers = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
        >>> pairs.add(numbers, 2 * numbers, range(40))
        >>> pairs.solve(4).text.weight.shape
        torch.Size([4, 6])
    """

    def __init__(self, fixed_images: bool = False) -> None:
        self._fixed_images = fixed_images
        self._folds: list[Moments] = []
        # Moments about a point near the mean: about zero, what is left after subtracting would be rounding errors.
        self._origin: tuple[Tensor, Tensor] | None = None
        self._samples: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in range(FOLDS)]
        self._groups_seen: set[int] = set()

    @property
    def count(self) -> int:
        """Pairs that were added."""
        return int(sum(fold.count for fold in self._folds))

    def add(self, texts: Tensor, images: Tensor, groups: Iterable[Hashable]) -> None:
        """Add pairs.

        Args:
            texts: (n, a).
            images: (n, f).
            groups: n, equal for pairs about the same thing, which are held out together.

        Raises:
            GroundingValueError: a number that is not finite; nothing is added then.
        """
        for name, rows in (("texts'", texts), ("images'", images)):
            if not bool(rows.isfinite().all()):
                wrong = (~rows.isfinite().all(1)).nonzero()[:, 0].tolist()
                raise GroundingValueError(
                    f"Of a part's {len(rows)} pairs, the {name} features of {len(wrong)} have NaN or infinite values, "
                    f"the first is number {wrong[0]}. Leave these pairs out."
                )
        texts, images = texts.detach().cpu().double(), images.detach().cpu().double()
        if self._origin is None:
            self._origin = texts.mean(0), images.mean(0)
            self._folds = [Moments.zeros(texts.shape[1], images.shape[1]) for _ in range(FOLDS)]
        hashes = [_stable_hash(group) for group in groups]
        folds = torch.tensor([number % FOLDS for number in hashes])
        for fold in range(FOLDS):
            chosen = (folds == fold).nonzero()[:, 0]
            self._folds[fold].add(texts[chosen] - self._origin[0], images[chosen] - self._origin[1])
        for number, text, image in zip(hashes, texts, images, strict=True):
            self._sample(number, text, image)

    def _sample(self, number: int, text: Tensor, image: Tensor) -> None:
        if len(self._groups_seen) < 2:
            self._groups_seen.add(number)
        kept = self._samples[number % FOLDS]
        # A group's first pair stands for it.
        if number in kept or (len(kept) == SAMPLED_GROUPS and number > max(kept)):
            return
        if len(kept) == SAMPLED_GROUPS:
            del kept[max(kept)]
        kept[number] = text.float().clone(), image.float().clone()

    def solve(self, width: int, candidates: Sequence[Penalties] | None = None) -> SharedSpace:
        """Return the shared space, with the penalties whose recalls of held-out groups are best, both ways.

        Args:
            width: q. If texts or images have fewer dimensions, the last ones are zero.
            candidates: penalties to choose from, the usual ones if None. If no fold has `MIN_HELD_OUT` groups,
                `DEFAULT` is taken.

        Raises:
            GroundingValueError: no pairs, pairs of one group only, or texts or images that are all the same.
        """
        if not self.count or len(self._groups_seen) < 2:
            raise GroundingValueError(
                f"There are {self.count} pairs, of {len(self._groups_seen)} different groups, a caption and its "
                "requests counted apart. What tells texts and images apart cannot be fitted to fewer than two groups. "
                "Give pairs of different things, or check the `group` column."
            )
        if candidates is None:
            candidates = TEXT_CANDIDATES if self._fixed_images else CANDIDATES
        total = summed(self._folds)
        penalties = self._choose(total, candidates) if len(candidates) > 1 else candidates[0]
        return self._space(Solver(total), width, penalties)

    def _choose(self, total: Moments, candidates: Sequence[Penalties]) -> Penalties:
        """Return the candidate with the best held-out recalls, but `DEFAULT` if that is within one standard error.

        A few hundred groups leave the recalls of neighbouring penalties within their noise. If only texts are
        fitted there is no usual choice.
        """
        scores: list[Tensor] = []
        for fold, kept in zip(self._folds, self._samples, strict=True):
            if len(kept) < MIN_HELD_OUT or fold.count == total.count:
                continue
            texts, images = (torch.stack(column) for column in zip(*kept.values(), strict=True))
            solver, of_fold = Solver(total.plus(fold, -1)), []
            for penalties in candidates:
                # As wide as it gets: which penalty is best hardly depends on the width.
                space = self._space(solver, min(texts.shape[1], images.shape[1], 256), penalties)
                cosines = F.normalize(space.text(texts), dim=-1) @ F.normalize(space.image(images), dim=-1).T
                of_fold.append(_recalls(cosines) + _recalls(cosines.T))
            scores.append(torch.stack(of_fold))
        if not scores:
            logger.warning(
                "%d pairs are too few to choose penalties by: no fold has %d groups. The usual ones are taken, %s.",
                *(int(total.count), MIN_HELD_OUT, DEFAULT),
            )
            return DEFAULT
        of_candidates = torch.cat(scores, 1)
        best = int(of_candidates.mean(1).argmax())
        if DEFAULT in candidates and not self._fixed_images:
            gains = of_candidates[best] - of_candidates[candidates.index(DEFAULT)]
            if gains.mean() <= gains.std() / len(gains) ** 0.5:
                return DEFAULT
        return candidates[best]

    def _space(self, solver: Solver, width: int, penalties: Penalties) -> SharedSpace:
        assert self._origin is not None, "add sets it"
        if self._fixed_images:
            weight = solver.regress(penalties.text)
            text_mean, image_mean = (mean + one for mean, one in zip(solver.means, self._origin, strict=True))
            # With the images' mean: of unit vectors, the one with the largest product is then the one nearest to what
            # the regression expects.
            text = LinearMap(weight.float(), (image_mean - weight @ text_mean).float())
            return SharedSpace(text, LinearMap(torch.eye(len(weight)), torch.zeros(len(weight))), penalties)
        sides = solver.solve(width, penalties)
        bias = torch.zeros(width, dtype=torch.float64)
        maps = [
            LinearMap(weight.float(), (bias - weight @ (mean + origin)).float())
            for weight, mean, origin in zip(sides, solver.means, self._origin, strict=True)
        ]
        return SharedSpace(maps[0], maps[1], penalties)


def _recalls(scores: Tensor) -> Tensor:
    """Return for each query (n,) of scores (n, n) at how many `RANKS` its candidate, on the diagonal, is found."""
    found = (scores >= scores.diagonal()[:, None]).sum(1)
    return torch.stack([(found <= rank).double() for rank in RANKS]).sum(0)


def _stable_hash(group: Hashable) -> int:
    """Return a number that is the same in every process, unlike `hash`."""
    return int.from_bytes(hashlib.sha256(repr(group).encode()).digest()[:8], "big")
