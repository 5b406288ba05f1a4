"""How an adapter's text side is best fitted to another LM: which captions, how many, and what after ridge.

    python benchmarks/transfer/scratch.py smollm2
    python benchmarks/transfer/study.py smollm2 gemma3

The target LM runs every caption once; all fits then read the states found at `[RET]`, so that they cost the LM nothing.
Recalls are those of the 120 validation concepts with the source's image side; the test concepts are left to accept.py.
Writes results/study_SOURCE_to_TARGET.json.
"""

from __future__ import annotations

import sys

import torch
from common import CACHE, OUT, Pairs, load_lm, recalls, texts_of, write
from torch import Tensor
from torch.nn import functional as F

from visual_ground.demo.weights import load_vision
from visual_ground.grounding import ground
from visual_ground.transferring.fit import caption_states, fit_states
from visual_ground.transferring.image_side import ImageSide

SEEDS = (0, 1, 2)


def states_of(target: str, pairs: Pairs, side: ImageSide) -> dict[str, Tensor]:
    """Return the states (kinds, concepts, width) of two splits' captions in the target LM."""
    torch.manual_seed(0)
    lm, tokenizer = load_lm(target)
    model = ground(lm, pairs.vision, tokenizer, config=side.config)
    found = {}
    for split in ("train", "validation"):
        kinds = texts_of(pairs, split)
        states = caption_states(model, tuple(text for kind in kinds for text in kind))
        found[split] = states.view(len(kinds), -1, states.shape[-1])
    model.unground()
    return found


def chosen(kind: str, count: int, concepts: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return kind and concept of the captions that `count` concepts are anchored by."""
    some = torch.randperm(concepts, generator=torch.Generator().manual_seed(seed))[:count]
    if kind == "both":
        return torch.tensor([0, 1]).repeat_interleave(len(some)), some.repeat(2)
    if kind == "either":
        return torch.arange(len(some)) % 2, some
    return torch.full_like(some, ("names", "sentences").index(kind)), some


def contrastive(weight: Tensor, bias: Tensor, scale: float, states: Tensor, images: Tensor, steps: int) -> tuple:
    """Train a linear map from states to their images' vectors by the contrastive loss over all anchors at once."""
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.AdamW([weight, bias], lr=1e-3, weight_decay=0.0)
    for _ in range(steps):
        scores = scale * F.normalize(F.linear(states, weight, bias), dim=-1) @ images.T
        own = torch.arange(len(scores))
        loss = (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weight.detach(), bias.detach()


def main(source: str, target: str) -> None:
    """Fit in every way, and write the recalls."""
    pairs = Pairs(CACHE, load_vision(), None)
    pairs.vision = load_vision()
    side = ImageSide.load(OUT / source)
    states = states_of(target, pairs, side)
    train = side.embed(pairs.features[pairs.numbers("train"), 0])
    held = pairs.features[pairs.numbers("validation")].transpose(0, 1)
    images = torch.stack([side.embed(style) for style in held])
    results = []
    for kind, count in [("both", n) for n in (869, 434, 217, 108)] + [
        (k, n) for k in ("either", "names", "sentences") for n in (869, 434)
    ]:
        for seed in SEEDS if count < 869 else SEEDS[:1]:
            which, some = chosen(kind, count, len(train), seed)
            own = states["train"][which, some]
            fitted = fit_states(own, train, some)
            one = {"captions": kind, "concepts": count, "seed": seed}
            for steps in (0, 30, 100, 300):
                scale = float(side.tensors["logit_scale"].exp())
                weight, bias = contrastive(fitted.weight, fitted.bias, scale, own, train[some], steps)
                vectors = F.normalize(F.linear(states["validation"], weight, bias), dim=-1)
                found = recalls(vectors, images)
                results.append({**one, "contrastive_steps": steps, "r10": {way: found[way]["r10"] for way in found}})
            print(one, [r["r10"] for r in results[-4:]], flush=True)
    write(f"study_{source}_to_{target}", {"validation": results})


if __name__ == "__main__":
    main(*sys.argv[1:])
