"""The order of the data, and what is sampled of it: functions of a seed and an index alone.

Nothing here has a state that a restart would have to restore, or in which two processes could differ.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler


def picker(seed: int, draw: int) -> Callable[[Sequence[Any]], Any]:
    """Return a function that chooses one of several at random, the same for the same seed and index.

    Example:
        >>> picker(0, 7)("abc") == picker(0, 7)("abc")
        True
    """
    return random.Random(f"{seed} {draw}").choice


def turns(seed: int, row: int, epoch: int) -> Callable[[Sequence[Any]], Any]:
    """Return a function that chooses one of several, the next one in each epoch.

    Called for a row's captions and then for its images, it goes through all their combinations before any comes again.
    Where a row begins depends on the seed.

    Example:
        >>> sorted(turns(0, 7, epoch)("abc") for epoch in range(3))
        ['a', 'b', 'c']
    """
    turn = epoch + random.Random(f"{seed} {row}").randrange(2**16)

    def choose(values: Sequence[Any]) -> Any:
        nonlocal turn
        turn, place = divmod(turn, len(values))
        return values[place]

    return choose


def first(values: Sequence[Any]) -> Any:
    """Return the first of several."""
    return values[0]


def happens(probability: float, seed: int, draw: int) -> bool:
    """Return True with this probability, the same for the same seed and index."""
    return random.Random(f"{seed} {draw} happens").random() < probability


class EpochSampler(Sampler[int]):
    """The indices of one epoch of an `ExampleDataset`, shuffled by seed and epoch alone.

    Args:
        length: examples in an epoch.
        seed: of the order.
        shuffle: False keeps the dataset's order.

    Example:
        >>> sampler = EpochSampler(2, seed=0, shuffle=False)
        >>> sampler.set_epoch(1)
        >>> list(sampler)
        [2, 3]
    """

    def __init__(self, length: int, seed: int, shuffle: bool = True) -> None:
        self.length, self.seed, self.shuffle, self.epoch = length, seed, shuffle, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        order = torch.arange(self.length)
        if self.shuffle:
            order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        return iter((order + self.epoch * self.length).tolist())
