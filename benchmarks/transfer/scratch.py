"""Fit an adapter from scratch on one of the two language models, as the demo fits it, to the demo's data.

    python benchmarks/transfer/scratch.py smollm2
    python benchmarks/transfer/scratch.py gemma3

Leaves the adapter in demo/transfer/NAME and its recalls and cost in benchmarks/transfer/results/scratch_NAME.json.
"""

from __future__ import annotations

import sys

import torch
from common import CACHE, OUT, Cost, Pairs, image_vectors, load_lm, recalls, text_vectors, write

from visual_ground.demo.run import SEED, fit_arguments
from visual_ground.demo.weights import load_vision
from visual_ground.fitting.fit import fit
from visual_ground.grounding import ground


def main(name: str) -> None:
    """Fit, save, evaluate."""
    lm, tokenizer = load_lm(name)
    vision = load_vision()
    pairs = Pairs(CACHE, vision, None)
    torch.manual_seed(SEED)
    model = ground(lm, vision, tokenizer)
    cost = Cost(lm)
    with cost.counting():
        fit(model, pairs.examples(), fit_arguments(OUT / f"{name}-training", CACHE))
    model.save_pretrained(OUT / name)
    found = {
        split: recalls(text_vectors(model, pairs, split), image_vectors(model, pairs, split))
        for split in ("test", "validation")
    }
    write(f"scratch_{name}", {"lm": name, "recalls": found, "cost": cost.to_dict()})


if __name__ == "__main__":
    main(sys.argv[1])
