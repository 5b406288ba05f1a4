"""The processes that `accelerate launch` started, each of which builds a part of an index."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from visual_ground.errors import GroundingError, GroundingStateError


@dataclass(frozen=True)
class Processes:
    """All processes of a build, seen from one of them.

    Args:
        number: of this process, from 0.
        count: how many there are.
        device: this process's own; None where it runs alone.
    """

    number: int = 0
    count: int = 1
    device: torch.device | None = None

    @classmethod
    def launched(cls) -> Processes:
        """Return the processes that were launched together with this one; itself where it runs alone."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:  # Asking accelerate would settle which devices it uses later.
            return cls()
        state = PartialState(cpu=not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes, state.device)

    def gather(self, value: Any) -> list[Any]:
        """Return what every process gives, in order, when all have given theirs."""
        return [value] if self.count == 1 else list(gather_object([value]))

    def raise_together(self, error: GroundingError | None) -> None:
        """Raise in all processes where one of them has failed, so that none waits for it for ever.

        Raises:
            GroundingError: what has failed here.
            GroundingStateError: what has failed elsewhere.
        """
        texts = self.gather(None if error is None else str(error))
        if error is not None:
            raise error
        failed = [f"process {number}: {text}" for number, text in enumerate(texts) if text is not None]
        if failed:
            raise GroundingStateError(f"Of {self.count} processes that build this index, {'; '.join(failed)}")
