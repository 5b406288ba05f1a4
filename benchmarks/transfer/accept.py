"""Move an adapter between two real LMs with the package's own `transfer`, and compare with training from scratch.

    python benchmarks/transfer/scratch.py smollm2
    python benchmarks/transfer/scratch.py gemma3
    python benchmarks/transfer/accept.py smollm2 gemma3
    python benchmarks/transfer/accept.py gemma3 smollm2

The source's adapter and its index of the test pictures are read from disk; its LM is never loaded. Anchors are the
pictures of 750 of the 869 training concepts in both styles, with one caption for each concept, a name or a sentence by
turns: with more, the captions alone would cost more than a tenth of what training does. Writes
results/SOURCE_to_TARGET.json: recalls on the 150 test concepts with the source's index, their ratio to those of the
adapter trained from scratch on TARGET, and both costs. A token that is run with gradient counts as two: the frozen LM
gets no gradients of its own, so that the way back is about as long as the way there.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from typing import Any

import torch
from common import CACHE, OUT, RESULTS, Cost, Pairs, load_lm, recalls, text_vectors, write

from visual_ground.adapter.anchors import Anchors
from visual_ground.demo import emoji
from visual_ground.demo.weights import load_vision
from visual_ground.evaluation.captions import caption_pair_accuracy
from visual_ground.index.image_index import ImageIndex
from visual_ground.model import GroundedModel
from visual_ground.transferring.image_side import ImageSide
from visual_ground.transferring.transfer import transfer

CONCEPTS = 750


def write_index(side: ImageSide, pairs: Pairs, name: str) -> None:
    """Index the test pictures of both styles, as a user of the source adapter has done long ago."""
    vectors = side.embed(pairs.features[pairs.numbers("test")].flatten(0, 1))
    ids = [f"{i}/{style}" for i in pairs.numbers("test") for style in emoji.STYLES]
    ImageIndex(vectors, ids).save_pretrained(OUT / f"{name}-index")


def told(model: GroundedModel, pairs: Pairs) -> dict[str, float]:
    """Return how well images are captioned, and how readily `[RET]` is said after captions, of the test concepts."""
    texts, features = pairs.pairs(pairs.numbers("test"))
    said = model.log_likelihood([f" {text}" for text in texts[:50]], [model.config.ret_token] * 50)
    return {
        "caption_pair_accuracy": round(caption_pair_accuracy(model, texts, features, wrong_images=3), 1),
        "ret_log_likelihood": round(float(said.mean()), 2),
    }


def passes(cost: dict[str, float]) -> float:
    """Return a cost in tokens run forward."""
    return cost["token_passes_without_gradient"] + 2 * cost["token_passes_with_gradient"]


def main(source: str, target: str) -> None:
    """Transfer in closed form, and write what it reaches."""
    pairs = Pairs(CACHE, load_vision(), None)
    side = ImageSide.load(OUT / source)
    write_index(side, pairs, source)
    images = ImageIndex.from_pretrained(OUT / f"{source}-index").vectors.unflatten(0, (-1, len(emoji.STYLES)))
    train = sorted(random.Random(0).sample(pairs.numbers("train"), CONCEPTS))
    texts = [[text] for text in pairs.pairs(train)[0] for _ in emoji.STYLES]
    anchors = Anchors(texts, pairs.features[train].flatten(0, 1))
    anchors.save(OUT / f"{source}-anchors")
    side = replace(side, vision=load_vision(), anchors=Anchors.load(OUT / f"{source}-anchors"))
    scratch = json.loads((RESULTS / f"scratch_{target}.json").read_text())
    results: dict[str, Any] = {}
    torch.manual_seed(0)
    lm, tokenizer = load_lm(target)
    cost = Cost(lm)
    with cost.counting():
        model = transfer(side, lm, tokenizer)
    found = recalls(text_vectors(model, pairs, "test"), images.transpose(0, 1))
    results["closed_form"] = {
        "recalls": found,
        "part_of_scratch_r10": {
            way: round(found[way]["r10"] / scratch["recalls"]["test"][way]["r10"], 3) for way in found
        },
        **told(model, pairs),
        "cost": cost.to_dict(),
        "part_of_scratch_compute": round(passes(cost.to_dict()) / passes(scratch["cost"]), 3),
    }
    print(results["closed_form"], flush=True)
    model.unground()
    lm, tokenizer = load_lm(target)
    scratch |= told(GroundedModel.from_pretrained(lm, OUT / target, side.vision, tokenizer), pairs)
    size = (OUT / f"{source}-anchors" / "anchors.safetensors").stat().st_size
    write(
        f"{source}_to_{target}",
        {"anchors": len(anchors), "anchor_bytes": size, **results, "scratch": scratch},
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
