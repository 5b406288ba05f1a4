"""Steps at the published sizes on a GPU: OPT-1.3b and OPT-6.7b shapes with ViT-L/14 in bfloat16 at batch 180.

    python benchmarks/training/gpu.py [--lm opt-6.7b] [--batch 180] [--rounds 5] [--peak-tflops 989]

Writes results/training_gpu_LM.json: seconds, peak memory and the part of the GPU's peak that the LM's and the tower's
own multiplications reach. Where a side does not fit, it says so in place of its numbers. Not run yet: no GPU was lent.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from baseline import Baseline, padded_ids
from lean import Lean
from shapes import batch, grounded, parts

sys.path.insert(0, str(Path(__file__).parent.parent))
from measure import write

SIDES = ("baseline", "ours", "ours_cached_features", "ours_cached_features_and_prefixes")


def to(value, device: str):
    """Move a batch."""
    if isinstance(value, dict):
        return {name: to(part, device) for name, part in value.items()}
    return value.to(device) if isinstance(value, torch.Tensor) else value


def useful_flops(model, made: dict, side: str) -> float:
    """Return the multiplications and additions that the losses and gradients need, without padding."""
    body = sum(p.numel() for n, p in model.lm.named_parameters() if "embed_tokens" not in n and "lm_head" not in n)
    head = model.lm.get_output_embeddings().weight.numel()
    tower = sum(p.numel() for p in model.vision.parameters())
    image_positions = (224 // model.vision.model.config.patch_size) ** 2 + 1
    words = sum(len(sequence.ids) for sequence in made["captioning"])
    labels = sum(sequence.num_labels for sequence in made["captioning"])
    rows = len(made["groups"])
    captions = 4 * (words * body + labels * head)  # forward, and backward to the images
    prefixes = 0 if "prefixes" in side else 2 * labels * (body + head)
    images = 0 if "features" in side else 2 * rows * image_positions * tower
    return captions + prefixes + 4 * rows * body + images


def measured(side: str, options: argparse.Namespace) -> dict:
    """Run one side by itself; return its median seconds, peak memory and utilisation."""
    torch.cuda.empty_cache()
    model = grounded(*parts(options.lm, "vit-l/14", torch.bfloat16, "cuda"))
    made = to(batch(model, options.batch), "cuda")
    if side == "baseline":
        baseline, ids = Baseline(model).to("cuda"), padded_ids(made).to("cuda")
        call = lambda: baseline.step(ids, made["pixel_values"])  # noqa: E731
    else:
        if "features" in side:
            made["image_features"] = model.vision(made.pop("pixel_values"))
        lean = Lean(model, prefixes="kept" if "prefixes" in side else "run")
        call = lambda: lean.step(made)  # noqa: E731
    built = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times, loss = [], call()
    for _ in range(options.rounds + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[1:])
    flops = useful_flops(model, made, side)
    return {
        "seconds": round(seconds, 4),
        "first_loss": round(loss, 4),
        "peak_mb_beyond_model": round((torch.cuda.max_memory_allocated() - built) / 1e6),
        "useful_tflop": round(flops / 1e12, 2),
        "utilisation": round(flops / seconds / options.peak_tflops / 1e12, 3),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--lm", nargs="+", default=["opt-1.3b", "opt-6.7b"])
    parser.add_argument("--batch", type=int, default=180)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="the GPU's dense bfloat16 peak")
    options = parser.parse_args()
    for name in options.lm:
        found: dict = {"batch": options.batch, "device": torch.cuda.get_device_name()}
        for side in SIDES:
            try:
                found[side] = measured(side, argparse.Namespace(**{**vars(options), "lm": name}))
            except torch.OutOfMemoryError as error:
                found[side] = {"did_not_fit": str(error).splitlines()[0]}
        write(f"training_gpu_{name}", found)
