"""Compute once what the study needs of a language model: its states at an untrained [RET] after every caption.

    python benchmarks/transfer/states.py smollm2
    python benchmarks/transfer/states.py gemma3

Writes demo/transfer/NAME-states.safetensors: for each split, states (kinds, concepts, h). With the start [RET] row a
state depends on nothing that is trained, so every fit of a text layer can start from these. The seconds are written
beside it.
"""

from __future__ import annotations

import sys
import time

import torch
from common import CACHE, OUT, Pairs, load_lm, texts_of

from visual_ground.demo.pieces import load_vision
from visual_ground.model import GroundedModel, ground
from visual_ground.saving import write_json, write_tensors


def run(model: GroundedModel, texts: list[str], size: int = 25) -> torch.Tensor:
    """Return the states (n, h) after these captions, run by length."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts = [model.text_states([texts[i] for i in order[n : n + size]])[0] for n in range(0, len(order), size)]
    return torch.cat(parts)[torch.tensor(order).argsort()]


def main(name: str) -> None:
    """Run every caption through the LM."""
    vision = load_vision()
    pairs = Pairs(CACHE, vision, None)
    lm, tokenizer = load_lm(name)
    torch.manual_seed(0)
    model = ground(lm, vision, tokenizer)
    start = time.perf_counter()
    states, counts = {}, {}
    for split in ("test", "validation", "train"):
        texts = texts_of(pairs, split)
        states[split] = torch.stack([run(model, kind) for kind in texts])
        counts[split] = sum(len(text) for kind in texts for text in model.tokenizer(kind)["input_ids"])
        print(split, tuple(states[split].shape), round(time.perf_counter() - start, 1), flush=True)
        write_tensors(OUT / f"{name}-states.safetensors", states)
    seconds = round(time.perf_counter() - start, 1)
    write_json(OUT / f"{name}-states.json", {"seconds": seconds, "tokens": counts})


if __name__ == "__main__":
    main(sys.argv[1])
