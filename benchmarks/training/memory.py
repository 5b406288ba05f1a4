"""Peak resident memory of two training steps beyond that of the built model, every side in a process of its own.

python benchmarks/training/memory.py [--batch 8 32]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from shapes import grounded, parts
from steps import SIDES, steps_of

sys.path.insert(0, str(Path(__file__).parent.parent))
from measure import write

MEASURED = SIDES[:3]


def peak_mb(side: str, size: int, shape: tuple[str, str]) -> float:
    """Run two steps; return the peak resident memory beyond that of the built model, in MB."""
    call = steps_of(side, grounded(*parts(*shape)), size)
    built = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        call()
    return round(_status("VmHWM") - built, 1)


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(name))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--shape", nargs=2, default=["opt-125m", "vit-b/32"])
    parser.add_argument("--side", choices=MEASURED)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.side:
        print(peak_mb(options.side, options.batch[0], tuple(options.shape)))
        raise SystemExit
    results: dict = {"shape": options.shape}
    for size in options.batch:
        found = {}
        for side in MEASURED:
            command = [sys.executable, __file__, "--side", side, "--batch", str(size), "--shape", *options.shape]
            found[side] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        share = {side: round(found[side] / found["baseline"], 3) for side in MEASURED[1:]}
        results[f"batch_{size}"] = {"mb": found, "part_of_baseline": share}
        write("training_memory", results)
