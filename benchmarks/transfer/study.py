"""Which way of moving the text layer works best, with how many anchors, both ways between the two LMs.

    python benchmarks/transfer/study.py

Reads the states of `states.py`; writes benchmarks/transfer/results/study.json. Every figure is a recall on the 150 test
concepts, which are neither trained on nor anchors, in per cent; the index of a transferred model is the source's.
"""

from __future__ import annotations

import time

import torch
from common import CACHE, OUT, Pairs, write
from heads import Data, Heads, ridge, train

from visual_ground.demo.pieces import load_vision
from visual_ground.demo.run import SETTINGS
from visual_ground.saving import read_json

COUNTS = (100, 200, 400, 869)
SEEDS = (0, 1, 2)


def mean_recalls(several: list[tuple[Heads, Data]]) -> dict[str, float]:
    """Return the mean recalls both ways over seeds."""
    found = [heads.recall(data) for heads, data in several]
    means = {
        f"{way}_{rank}": round(sum(one[way][rank] for one in found) / len(found), 2)
        for way in ("text_to_image", "image_to_text")
        for rank in ("r1", "r10")
    }
    return means


def compare(source: Data, target: Data) -> dict[str, dict]:
    """Move image sides that were trained with `source` to the LM of `target`, in every way."""
    sides = [train(source, seed=seed) for seed in SEEDS]
    scratch = [train(target, seed=seed) for seed in SEEDS]
    results: dict[str, dict] = {
        "source": mean_recalls([(heads, source) for heads in sides]),
        "scratch_on_target": mean_recalls([(heads, target) for heads in scratch]),
    }
    # Without a closed form: a text layer from random values, by descent against the kept image side.
    random = [Heads(h.mean, h.std, h.image, _noise(s), h.scale) for h, s in zip(sides, scratch, strict=True)]
    results["random_then_110_steps"] = mean_recalls([(train(target, heads), target) for heads in random])
    for count in COUNTS:
        anchors = target.take(count)
        start = time.process_time()
        fitted = [ridge(anchors, side) for side in sides]
        seconds = (time.process_time() - start) / len(sides)
        ways = {
            "ridge": fitted,
            "ridge_half_whitened": [ridge(anchors, side, 0.5) for side in sides],
            "ridge_whitened": [ridge(anchors, side, 1.0) for side in sides],
            "ridge_then_11_steps": [train(anchors, heads, 11, 3e-4) for heads in fitted],
            "ridge_then_110_steps": [train(anchors, heads, 110, 3e-4) for heads in fitted],
        }
        results[f"{len(anchors.states)}_anchors"] = {
            **{name: mean_recalls([(heads, target) for heads in found]) for name, found in ways.items()},
            "ridge_cpu_seconds": round(seconds, 2),
        }
    return results


def _noise(like: Heads) -> torch.Tensor:
    return torch.randn_like(like.text) / like.text.shape[1] ** 0.5


def main() -> None:
    """Compare both ways and write the results."""
    pairs = Pairs(CACHE, load_vision(), None)
    smollm2, gemma3 = Data.load("smollm2", pairs), Data.load("gemma3", pairs)
    write(
        "study",
        {
            "training_concepts": len(smollm2.states),
            "test_concepts": len(smollm2.test_states),
            "seeds": len(SEEDS),
            "steps_from_scratch": SETTINGS["max_steps"],
            "states": {name: read_json(OUT / f"{name}-states.json") for name in ("smollm2", "gemma3")},
            "smollm2_to_gemma3": compare(smollm2, gemma3),
            "gemma3_to_smollm2": compare(gemma3, smollm2),
        },
    )


if __name__ == "__main__":
    main()
