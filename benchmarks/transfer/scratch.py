"""Train from scratch on one of the two language models, with the demo's settings, data and trainer.

    python benchmarks/transfer/scratch.py smollm2
    python benchmarks/transfer/scratch.py gemma3

Leaves the adapter in demo/transfer/NAME and its recalls and cost in benchmarks/transfer/results/scratch_NAME.json.
"""

from __future__ import annotations

import sys

import torch
from common import CACHE, OUT, Cost, Pairs, image_vectors, load_lm, recalls, text_vectors, write

from visual_ground.demo.run import SETTINGS, training_arguments
from visual_ground.demo.weights import load_vision
from visual_ground.grounding import ground
from visual_ground.training.trainer import GroundingTrainer


def main(name: str) -> None:
    """Train, save, evaluate."""
    lm, tokenizer = load_lm(name)
    vision = load_vision()
    pairs = Pairs(CACHE, vision, None)
    torch.manual_seed(SETTINGS["seed"])
    model = ground(lm, vision, tokenizer)
    args = training_arguments(OUT / f"{name}-training", CACHE, SETTINGS)
    trainer, cost = GroundingTrainer(model, args, pairs.examples()), Cost(lm)
    with cost.counting():
        trainer.train()
    model.save_pretrained(OUT / name)
    found = {
        split: recalls(text_vectors(model, pairs, split), image_vectors(model, pairs, split))
        for split in ("test", "validation")
    }
    write(f"scratch_{name}", {"lm": name, "settings": SETTINGS, "recalls": found, "cost": cost.to_dict()})


if __name__ == "__main__":
    main(sys.argv[1])
