"""Compute once what the study needs of a language model: its states at an untrained [RET] after captions.

    python benchmarks/transfer/states.py smollm2
    python benchmarks/transfer/states.py gemma3

With the start [RET] row a state depends on nothing that is trained, so every fit of a text layer can start from these.
Names only (the first kind of caption), test concepts first, then those of training in a fixed random order. Writes
demo/transfer/NAME-states.safetensors, states (n, h) and the concepts' numbers (n,), after every few captions, and goes
on from there when it is started again.
"""

from __future__ import annotations

import sys
import time

import torch
from common import OUT, load_lm
from safetensors.torch import load_file
from torch import Tensor, nn

from visual_ground.demo import emoji
from visual_ground.model import ground
from visual_ground.saving import read_json, write_json, write_tensors
from visual_ground.vision import VisionEncoder

AT_ONCE = 40


class NoEyes(nn.Module):
    """An encoder of the right width, for states of texts alone."""

    def forward(self, pixels: Tensor) -> Tensor:
        """Return zeros (n, 1280)."""
        return torch.zeros(len(pixels), 1280)


def queue() -> list[int]:
    """Return the concepts' numbers in the order in which they are run."""
    splits = [concept.split for concept in emoji.concepts()]
    train = [i for i, split in enumerate(splits) if split == "train"]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    return [i for i, split in enumerate(splits) if split == "test"] + [train[i] for i in order]


def main(name: str) -> None:
    """Run the captions that were not run yet."""
    path, spent = OUT / f"{name}-states.safetensors", OUT / f"{name}-states.json"
    lm, tokenizer = load_lm(name)
    processor = lambda images, return_tensors: {"pixel_values": torch.zeros(len(images), 1)}  # noqa: E731
    model, concepts, numbers = ground(lm, VisionEncoder(NoEyes(), processor), tokenizer), emoji.concepts(), queue()
    done = load_file(path)["states"] if path.is_file() else torch.empty(0, model.facts.head_dim)
    cost = read_json(spent) if spent.is_file() else {"cpu_seconds": 0.0, "tokens": 0}
    while len(done) < len(numbers):
        texts = [emoji.captions(concepts[i])[0] for i in numbers[len(done) : len(done) + AT_ONCE]]
        start = time.process_time()
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        states = [model.text_states([texts[i] for i in order[n : n + 10]])[0] for n in range(0, len(order), 10)]
        done = torch.cat([done, torch.cat(states)[torch.tensor(order).argsort()]])
        cost["cpu_seconds"] = round(cost["cpu_seconds"] + time.process_time() - start, 2)
        cost["tokens"] += sum(len(ids) + 4 for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
        write_tensors(path, {"states": done, "numbers": torch.tensor(numbers[: len(done)])})
        write_json(spent, {**cost, "format_version": 1})
        print(len(done), cost, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
