"""`Processes`: those of an `accelerate launch`, each of which does its share of some work; or this one alone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from visual_ground.errors import GroundingError, GroundingStateError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes that do the same work, and which of them this is; by itself, one alone.

    Args:
        index: the number of this process, from 0.
        count: how many there are.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def launched(cls) -> Processes:
        """Return the processes that were launched together, which this one joins; itself where it runs alone."""
        together = dist.is_available() and dist.is_initialized()
        if not together and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # Not asked of a process that runs alone, for which it would choose a device that a program chooses later.
            PartialState(cpu=not torch.cuda.is_available())
            together = True
        return cls(dist.get_rank(), dist.get_world_size()) if together else cls()

    @property
    def is_main(self) -> bool:
        """Whether this is the process that shows progress bars and writes reports."""
        return self.index == 0

    @property
    def device(self) -> torch.device:
        """The GPU of this process, where there is one; else the CPU."""
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("cpu")

    def share(self, batches: Sequence[T]) -> list[T]:
        """Return this process's part; the first are repeated until all have equally many.

        A sharded LM must be called equally often by all.
        """
        if not batches:
            return []
        rounds = -(-len(batches) // self.count)
        return [batches[(i * self.count + self.index) % len(batches)] for i in range(rounds)]

    def gather(self, value: T) -> list[T]:
        """Return the value of every process, in their order, in every process."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Wait for all the others."""
        if self.count > 1:
            dist.barrier()

    def raise_together(self, error: GroundingError | None) -> None:
        """Raise what has failed here, if anything, or else elsewhere, so that no process waits for one for ever."""
        texts = self.gather(None if error is None else str(error))
        if error is not None:
            raise error
        failed = [f"process {index}: {text}" for index, text in enumerate(texts) if text is not None]
        if failed:
            raise GroundingStateError(f"Of {self.count} processes that work together, {'; '.join(failed)}")

    @contextmanager
    def folder(self, given: str | os.PathLike[str] | None) -> Iterator[Path]:
        """Give the folder that all work in, or where None a temporary one, which is taken away afterwards."""
        if given is not None:
            yield Path(given)
            return
        temporary = tempfile.TemporaryDirectory() if self.is_main else None
        name = self.gather("" if temporary is None else temporary.name)[0]
        try:
            yield Path(name)
            self.wait()
        finally:
            if temporary is not None:
                temporary.cleanup()
