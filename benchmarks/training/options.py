"""What each way of saving is worth on its own: processor seconds of a step with cached features, by turns, one thread.

python benchmarks/training/options.py [--batch 8] [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from lean import Lean
from shapes import batch, grounded, parts

from visual_ground.training.losses.captioning import ComputePlan
from visual_ground.training.speedups.packing import lay_out, read

sys.path.insert(0, str(Path(__file__).parent.parent))
from measure import write

WHOLE = ComputePlan(direct_head=True, packed=True)


def main() -> None:
    """Measure and write results/training_options.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", nargs=2, default=["opt-125m", "tiny"])
    parser.add_argument("--name", default="training_options")
    options = parser.parse_args()
    torch.set_num_threads(1)
    published = grounded(*parts(*options.shape))
    prompted = grounded(*parts(*options.shape), caption_prompt="w5", image_prompt="w6 w7 {image} w8")
    made = {}
    for model in (published, prompted):
        made[model] = batch(model, options.batch)
        made[model]["image_features"] = model.vision(made[model].pop("pixel_values"))
    sides = {
        "plain": Lean(published, ComputePlan(), "none"),
        "direct_head": Lean(published, ComputePlan(direct_head=True), "none"),
        "packed": Lean(published, ComputePlan(packed=True), "none"),
        "prefixes": Lean(published, ComputePlan(), "run"),
        "prefixes_kept": Lean(published, ComputePlan(), "kept"),
        "direct_head_packed_prefixes": Lean(published, WHOLE, "run"),
        "and_rows_at_once_2": Lean(published, replace(WHOLE, mini_batch_size=2), "run"),
        "and_bf16_autocast": Lean(published, WHOLE, "run", autocast=True),
        "and_gradient_checkpointing": Lean(published, WHOLE, "run"),
        "prompted": Lean(prompted, WHOLE, "run"),
        "prompted_and_leads": Lean(prompted, replace(WHOLE, shared_prefix=True), "run"),
    }
    sides["and_gradient_checkpointing"].objective.activation_checkpointing_enable()
    calls = {name: (lambda side=side: side.step(made[side.model])) for name, side in sides.items()}
    captions, texts = made[published]["captioning"], made[published]["retrieval"]
    calls["forward_passes_apart"] = lambda: apart(published, captions, texts)
    calls["forward_passes_joined"] = lambda: joined(published, captions, texts)
    spent: dict[str, list[float]] = {name: [] for name in calls}
    losses = {}
    for name, call in calls.items():
        losses[name] = call()
    for _ in range(options.rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            spent[name].append(time.process_time() - start)
        print({name: round(times[-1], 2) for name, times in spent.items()}, file=sys.stderr, flush=True)
    results = {
        "shape": options.shape[0],
        "batch": options.batch,
        "cpu_s": {name: round(statistics.median(times), 3) for name, times in spent.items()},
        "first_loss": {name: round(loss, 5) for name, loss in losses.items()},
        "load_average": round(os.getloadavg()[1], 1),
    }
    write(options.name, results)


def apart(model, captions: list, texts: list) -> float:
    """Run both passes of whole sequences forward and backward, one after the other; return the summed states."""
    total = 0.0
    table = model.active.image_tokens(image_features=torch.zeros(len(captions), model.vision.feature_dim))
    for part, images in ((captions, table), (texts, None)):
        for laid_out in lay_out(model, part, packed=False):
            loss = read(model, laid_out, image_tokens=images).head_input.square().sum()
            loss.backward(retain_graph=True)
            total += float(loss.detach())
    return total


def joined(model, captions: list, texts: list) -> float:
    """Run the sequences of both passes in one batch."""
    table = model.active.image_tokens(image_features=torch.zeros(len(captions), model.vision.feature_dim))
    total = 0.0
    for laid_out in lay_out(model, [*captions, *texts], packed=False):
        loss = read(model, laid_out, image_tokens=table).head_input.square().sum()
        loss.backward(retain_graph=True)
        total += float(loss.detach())
    return total


if __name__ == "__main__":
    main()
