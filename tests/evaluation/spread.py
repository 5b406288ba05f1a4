"""Runs a small evaluation as one of two processes: python -m tests.evaluation.spread DATA FOLDER RANK [fail].

With a fourth word, the first process fails at its second batch, and each writes the error that it gets.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch.distributed as dist

from tests.evaluation.nearness import Nearness
from tests.tiny import grounded
from visual_ground import evaluate
from visual_ground.errors import GroundingError, GroundingValueError


class Calls(list):
    """Which batches were measured; of the process that fails, only one is."""

    def __init__(self, fails):
        super().__init__()
        self.fails = fails

    def append(self, batch):
        if self.fails and self:
            raise GroundingValueError("no more")
        super().append(batch)


def main(data, folder, rank, fails=""):
    """Write this process's report and which batches it measured."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    calls = Calls(fails and rank == 0)
    try:
        report = evaluate(grounded(), Nearness(data, calls), batch_size=2, progress=False).to_json()
    except GroundingError as error:
        report = f"{type(error).__name__}: {error}"
    (folder / f"report-{rank}.json").write_text(report)
    (folder / f"calls-{rank}.json").write_text(json.dumps(calls))
    end = time.monotonic() + 60
    while not (folder / f"calls-{1 - rank}.json").exists() and time.monotonic() < end:
        time.sleep(0.05)
    # Without taking its group down: torch may abort a process that does so while the other one ends.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
