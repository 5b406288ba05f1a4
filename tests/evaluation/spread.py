"""Runs a small evaluation as one of two processes: python -m tests.evaluation.spread DATA FOLDER RANK."""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from tests.evaluation.nearness import Nearness
from tests.tiny import grounded
from visual_ground import evaluate


def main(data, folder, rank):
    """Write this process's report and which batches it measured."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    calls = []
    report = evaluate(grounded(), Nearness(data, calls), batch_size=2, progress=False)
    (folder / f"report-{rank}.json").write_text(report.to_json())
    (folder / f"calls-{rank}.json").write_text(json.dumps(calls))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
