"""`Processes`: those of an `accelerate launch`, each of which measures its share; or this one alone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

T = TypeVar("T")


class Processes:
    """The processes that run the same evaluation, and which of them this is.

    Attributes:
        index: the number of this process, from 0.
        count: how many there are.
        device: the GPU of this process, where there is one; else the CPU.
    """

    def __init__(self) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not _is_initialized():
            PartialState()  # Joins the others of the launch; without one, it would choose a device for the program.
        local = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
        together = _is_initialized()
        self.index: int = dist.get_rank() if together else 0
        self.count: int = dist.get_world_size() if together else 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that shows progress bars and writes reports."""
        return self.index == 0

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


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()
