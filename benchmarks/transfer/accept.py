"""Move an adapter between two real LMs with the package's own `transfer`, and compare with training from scratch.

    python benchmarks/transfer/scratch.py smollm2
    python benchmarks/transfer/scratch.py gemma3
    python benchmarks/transfer/accept.py smollm2 gemma3
    python benchmarks/transfer/accept.py gemma3 smollm2

The source's adapter and its index of the test pictures are read from disk; its LM is never loaded. Anchors are training
concepts in one style, their names and sentences. Writes results/SOURCE_to_TARGET.json: recalls on the 150 test concepts
with the source's index, their ratio to those of the adapter trained from scratch on TARGET, and both costs. It
has not been run to the end yet, so there are no results.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from common import CACHE, OUT, RESULTS, Cost, Pairs, load_lm, recalls, text_vectors, write

from visual_ground.anchors import Anchors
from visual_ground.demo import emoji
from visual_ground.demo.pieces import load_vision
from visual_ground.index import ImageIndex
from visual_ground.saving import read_json
from visual_ground.transfer import ImageSide, Refinement, transfer

ANCHORS = 869
STEPS = 10


def write_index(side: ImageSide, pairs: Pairs, name: str) -> None:
    """Index the test pictures of both styles, as a user of the source adapter has done long ago."""
    vectors = side.embed(pairs.features[pairs.numbers("test")].flatten(0, 1))
    ids = [f"{i}/{style}" for i in pairs.numbers("test") for style in emoji.STYLES]
    ImageIndex(vectors, ids).save_pretrained(OUT / f"{name}-index")


def main(source: str, target: str) -> None:
    """Transfer in closed form, then with refinement; write both."""
    pairs = Pairs(CACHE, load_vision(), None)
    side = ImageSide.load(OUT / source)
    write_index(side, pairs, source)
    images = ImageIndex.from_pretrained(OUT / f"{source}-index").vectors.unflatten(0, (-1, len(emoji.STYLES)))
    train = pairs.numbers("train")
    captions = [emoji.captions(pairs.concepts[i])[:2] for i in train]
    anchors = Anchors(captions, pairs.features[train, 0]).take(ANCHORS)
    anchors.save(OUT / f"{source}-anchors")
    side = replace(side, vision=load_vision(), anchors=Anchors.load(OUT / f"{source}-anchors"))
    scratch = read_json(RESULTS / f"scratch_{target}.json")
    results = {}
    for name, steps in (("closed_form", 0), ("refined", STEPS)):
        torch.manual_seed(0)
        lm, tokenizer = load_lm(target)
        cost = Cost(lm)
        with cost.counting():
            model = transfer(side, lm, tokenizer, refinement=Refinement(steps=steps))
        found = recalls(text_vectors(model, pairs, "test"), images.transpose(0, 1))
        results[name] = {
            "recalls": found,
            "part_of_scratch_r10": {
                way: round(found[way]["r10"] / scratch["recalls"]["test"][way]["r10"], 3) for way in found
            },
            "cost": cost.to_dict(),
        }
        print(name, results[name], flush=True)
    size = (OUT / f"{source}-anchors" / "anchors.safetensors").stat().st_size
    write(
        f"{source}_to_{target}",
        {"anchors": len(anchors), "anchor_bytes": size, "steps": STEPS, **results, "scratch": scratch},
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
