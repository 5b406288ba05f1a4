"""`Records`: what was measured of each unit, on disk from the moment that it is known."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from visual_ground.errors import GroundingValueError
from visual_ground.evaluation.running.plan import Record
from visual_ground.processes import Processes
from visual_ground.storage.append_only import AppendOnlyStore

RECORDS_FILE = "records.jsonl"
VECTOR = np.dtype("<f4")


class Records:
    """The records of one evaluation by unit, one JSON line each, in a folder of its own; all its processes add to it.

    A batch is added whole or not at all, so a process that is killed at any moment leaves only whole batches.
    """

    def __init__(self, folder: Path) -> None:
        self._store = AppendOnlyStore(folder, RECORDS_FILE)

    def known(self, processes: Processes) -> set[str]:
        """Return the units that any process has records of."""
        self._store.refresh()
        return set().union(*processes.gather(set(self._store.numbers)))

    def add(self, units: Sequence[str], records: Sequence[Record]) -> None:
        """Add the records of a batch of units.

        Raises:
            GroundingValueError: another number of records than of units, or a number in one that is not finite.
            GroundingFileError: the disk is full, or cannot be written.
        """
        if len(units) != len(records):
            raise GroundingValueError(f"{len(units)} units need as many records, got {len(records)}.")
        lines = {}
        for unit, record in zip(units, records, strict=True):
            try:
                lines[unit] = (json.dumps(record, allow_nan=False) + "\n").encode()
            except ValueError as error:
                raise GroundingValueError(
                    f"What was measured of {unit!r} is not finite: {str(record)[:200]}. The adapter or the language "
                    "model gives NaN or infinity there; look at its weights and dtype."
                ) from error
        self._store.add(lines)

    def join(self, processes: Processes) -> None:
        """Give every process the records that it lacks, where their folders are on different disks."""
        processes.wait()
        self._store.refresh()
        held = processes.gather(set(self._store.numbers))
        lacking = {unit for units in held for unit in units if not all(unit in others for others in held)}
        mine = {unit: self._read(unit) for unit in sorted(lacking & set(self._store.numbers))}
        for records in processes.gather(mine):
            self._store.add(records)

    def read(self, units: Sequence[str]) -> list[Record]:
        """Return the records of units, in this order."""
        return [json.loads(self._read(unit)) for unit in units]

    def _read(self, unit: str) -> bytes:
        return self._store.read(self._store.numbers[unit])


def pack(vector: Tensor) -> str:
    """Return a vector (q,) for a record: its float32 numbers as base64, to the bit and in half of the room."""
    return base64.b64encode(vector.detach().float().cpu().numpy().astype(VECTOR).tobytes()).decode("ascii")


def unpack(texts: Sequence[str]) -> Tensor:
    """Return packed vectors as (n, q) float32 on the CPU.

    Example:
        >>> unpack([pack(torch.tensor([0.5, -1.0]))]).tolist()
        [[0.5, -1.0]]
    """
    rows = [np.frombuffer(base64.b64decode(text), VECTOR) for text in texts]
    return torch.from_numpy(np.stack(rows).astype(np.float32)) if rows else torch.empty(0, 0)
