"""A training step through the whole of `GroundingTrainer`, against the same step alone and the reference's work.

    python benchmarks/training/trainer_steps.py [--batch 8] [--rounds 3]

By turns, in processor seconds of one thread: the baseline's step, ours alone (as in steps.py), and ours as the trainer
runs it, from the end of one step to the end of the next. Of the latter, what the loader takes (from the end of a step
until the next one begins) and what the meters take are noted apart.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parent))
from shapes import captions, grounded, parts
from steps import steps_of

from visual_ground import GroundedModel, GroundingTrainer, GroundingTrainingArguments

sys.path.insert(0, str(Path(__file__).parent.parent))
from measure import write

SIDES: dict[str, dict[str, Any]] = {
    "ours": {"cache_features": False},
    "ours_cached_features": {},
    "ours_cached_features_and_prefixes": {"prefix_cache_gb": 8.0},
}
# Batches in an epoch, and the steps of a run: what is kept is there after the first epoch.
BATCHES, STEPS = 2, 6


class Clock(TrainerCallback):
    """Notes the processor seconds of each step, and those of its parts that are not the step itself."""

    def __init__(self) -> None:
        self.ends, self.loading, self.metering = list[float](), list[float](), list[float]()
        self._meters = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note what the loader took."""
        if self.ends:
            self.loading.append(time.process_time() - self.ends[-1])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the step's end."""
        self.ends.append(time.process_time())
        self.metering.append(self._meters)
        self._meters = 0.0

    def around(self, method: Any) -> Any:
        """Return a method of the meters that is timed."""

        def timed(*args: Any, **options: Any) -> Any:
            start = time.process_time()
            try:
                return method(*args, **options)
            finally:
                self._meters += time.process_time() - start

        return timed


def trainer_steps(model: GroundedModel, size: int, side: str, folder: str) -> dict[str, float]:
    """Return medians of a trainer's steps after the first epoch, in processor seconds."""
    texts = captions(BATCHES * size)
    pictures = [Image.new("RGB", (1, 1), (number % 256, number // 256, 7)) for number in range(len(texts))]
    rows = [{"image": picture, "caption": text} for picture, text in zip(pictures, texts, strict=True)]
    settings = dict(concat_captions_prob=0.0, end_captions=False, data_dependent_init=False, save_strategy="no")
    settings |= dict(report_to="none", disable_tqdm=True, use_cpu=True, logging_steps=1, learning_rate=3e-4)
    args = GroundingTrainingArguments(
        folder, max_steps=STEPS, per_device_train_batch_size=size, **settings, **SIDES[side]
    )
    clock = Clock()
    trainer = GroundingTrainer(model, args, rows, callbacks=[clock])
    trainer.meters.count, trainer.meters.read = clock.around(trainer.meters.count), clock.around(trainer.meters.read)
    trainer.train()
    model.eval()
    spent = [later - earlier for earlier, later in zip(clock.ends, clock.ends[1:], strict=False)]
    later = slice(BATCHES, None)
    kinds = {"whole": spent[later], "loader": clock.loading[later], "meters": clock.metering[1:][later]}
    return {name: statistics.median(values) for name, values in kinds.items()}


def timed(size: int, rounds: int, shape: tuple[str, str]) -> dict[str, Any]:
    """Time all by turns; return their medians, and the baseline's over each."""
    model = grounded(*parts(*shape))
    alone = {side: steps_of(side, model, size) for side in ("baseline", *SIDES)}
    for call in alone.values():
        call()
    spent: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for done in range(rounds):
            for side, call in alone.items():
                start = time.process_time()
                call()
                spent.setdefault(side, []).append(time.process_time() - start)
            for side in SIDES:
                for part, seconds in trainer_steps(model, size, side, f"{folder}/{side}").items():
                    spent.setdefault(f"{side}: {part}", []).append(seconds)
            print(done, {name: round(times[-1], 3) for name, times in spent.items()}, file=sys.stderr, flush=True)
    medians = {name: statistics.median(times) for name, times in spent.items()}
    ratios = {
        side: {
            "alone": round(medians["baseline"] / medians[side], 2),
            "trainer": round(medians["baseline"] / medians[f"{side}: whole"], 2),
        }
        for side in SIDES
    }
    return {"cpu_s": {name: round(value, 4) for name, value in medians.items()}, "baseline_over_ours": ratios}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", nargs=2, default=["opt-125m", "vit-b/32"])
    parser.add_argument("--name", default="training_trainer_steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"shape": options.shape}
    for size in options.batch:
        results[f"batch_{size}"] = timed(size, options.rounds, tuple(options.shape))
        results["load_average"] = round(os.getloadavg()[1], 1)
        write(options.name, results)
