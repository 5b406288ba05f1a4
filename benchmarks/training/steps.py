"""A training step of ours against the reference's work, on the CPU, step by step in turns.

    python benchmarks/training/steps.py [--batch 8 32] [--rounds 5]

Wall and processor seconds are both noted, for one thread: on a machine that others use too, the processor's are the
steadier ones. Memory is measured by memory.py.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from baseline import Baseline, padded_ids
from lean import Lean
from shapes import batch, grounded, parts

from visual_ground import GroundedModel

sys.path.insert(0, str(Path(__file__).parent.parent))
from measure import write

SIDES = ("baseline", "ours", "ours_cached_features", "ours_cached_features_and_prefixes")


def steps_of(side: str, model: GroundedModel, size: int, full: bool = False) -> Callable[[], float]:
    """Return a call that runs one step of a side."""
    made = batch(model, size, full=full)
    if side == "baseline":
        baseline, ids, pixels = Baseline(model), padded_ids(made), made["pixel_values"]
        return lambda: baseline.step(ids, pixels)
    if "features" in side:
        made["image_features"] = model.vision(made.pop("pixel_values"))
    lean = Lean(model, prefixes="kept" if "prefixes" in side else "run")
    return lambda: lean.step(made)


def timed(size: int, rounds: int, full: bool, shape: tuple[str, str]) -> dict:
    """Time all sides by turns; return their medians, and the baseline's over each of ours."""
    model = grounded(*parts(*shape))
    start_values = copy.deepcopy(model.adapter.state_dict())
    calls = {side: steps_of(side, model, size, full) for side in SIDES}
    first = {}
    for side, call in calls.items():
        model.adapter.load_state_dict(start_values)
        first[side] = call()
    wall: dict[str, list[float]] = {side: [] for side in SIDES}
    cpu: dict[str, list[float]] = {side: [] for side in SIDES}
    for done in range(rounds):
        for side, call in calls.items():
            start = time.perf_counter(), time.process_time()
            call()
            wall[side].append(time.perf_counter() - start[0])
            cpu[side].append(time.process_time() - start[1])
        print(size, done, {side: round(spent[-1], 2) for side, spent in cpu.items()}, file=sys.stderr, flush=True)
    result: dict = {"first_loss": {side: round(loss, 5) for side, loss in first.items()}}
    for name, spent in (("wall", wall), ("cpu", cpu)):
        medians = {side: statistics.median(times) for side, times in spent.items()}
        result[f"{name}_s"] = {side: round(value, 3) for side, value in medians.items()}
        result[f"{name}_ratio"] = {side: round(medians["baseline"] / medians[side], 2) for side in SIDES[1:]}
        fractions = {side: [a / b for a, b in zip(spent["baseline"], spent[side], strict=True)] for side in SIDES[1:]}
        result[f"{name}_ratio_of_each_round"] = {
            side: [round(min(values), 2), round(max(values), 2)] for side, values in fractions.items()
        }
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--full", action="store_true", help="all captions as long as fits: nothing to gain by packing")
    parser.add_argument("--shape", nargs=2, default=["opt-125m", "vit-b/32"])
    parser.add_argument("--name", default="training_steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict = {"shape": options.shape, "captions": "all full" if options.full else "as long as web captions"}
    for size in options.batch:
        results[f"batch_{size}"] = timed(size, options.rounds, options.full, tuple(options.shape))
        results["load_average"] = round(os.getloadavg()[1], 1)
        write(options.name, results)
