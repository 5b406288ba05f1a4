"""Does a bank of cached image features as further negatives help? On the demo's data (run `make demo` first).

    python benchmarks/training/bank.py [--cache demo/cache] [--concepts 400]

To be quick it trains the retrieval layers and the temperature alone, on the states at `[RET]`'s start value, which are
computed once; `[RET]` itself stays fixed. Recall on concepts never seen, mean and spread over seeds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from visual_ground import GroundedModel, ground
from visual_ground.adapter.initialization import standardize_features
from visual_ground.demo import emoji
from visual_ground.demo.run import Pairs
from visual_ground.demo.weights import load_lm, load_vision
from visual_ground.evaluation.retrieval import recall_at
from visual_ground.prompts.encoded import EncodedPrompt
from visual_ground.training.losses.contrastive import FeatureBank, contrast

sys.path.insert(0, str(Path(__file__).parent.parent))
from measure import write

SEEDS, STEPS, BATCH = 5, 200, 32


@torch.no_grad()
def states_at_ret(model: GroundedModel, texts: list[str]) -> torch.Tensor:
    """Return what the output head reads at a `[RET]` after each caption, (n, h)."""
    encoder, found = model.processor, []
    for start in range(0, len(texts), 32):
        lead = encoder.caption_prefix(image=False)
        rows = [(*lead, *encoder.encode_caption(text), model.ret_token_id) for text in texts[start : start + 32]]
        batch = model._collate([EncodedPrompt(row, ()) for row in rows], "left")
        last = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        last[:, -1] = True
        with model.frozen_lm.bind(None, last) as call:
            model.frozen_lm.run(batch["input_ids"], batch["attention_mask"], use_cache=False)
        assert call.head_input is not None
        found.append(call.head_input[0])
        print("states", start, file=sys.stderr, flush=True)
    return torch.cat(found)


def trained_recall(model: GroundedModel, data: dict, size: int, seed: int) -> tuple[float, float]:
    """Train the retrieval layers anew; return R@1 and R@10, text to image, in percent, on held-out concepts."""
    torch.manual_seed(seed)
    adapter = model.adapter
    for layer in (adapter.image_retrieval_projection, adapter.text_retrieval_projection[0]):
        layer.reset_parameters()
    adapter.logit_scale.data.fill_(2.659)
    layers = [
        *adapter.image_retrieval_projection.parameters(),
        *adapter.text_retrieval_projection.parameters(),
        adapter.logit_scale,
    ]
    optimizer = torch.optim.AdamW(layers, lr=1e-3, weight_decay=0.0)
    states, features, count = data["states"], data["features"], len(data["features"])
    bank = FeatureBank(features.flatten(0, 1), torch.arange(count).repeat_interleave(2), size) if size else None
    for _ in range(STEPS):
        rows = torch.randperm(count)[:BATCH]
        styles, kinds = torch.randint(2, (2, BATCH))
        vectors = adapter.embed_states([states[rows, kinds]])
        found = contrast(adapter, vectors, features[rows, styles], rows, bank)
        loss = (found.text_to_image + found.image_to_text) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        texts, images = adapter.embed_states([data["held_states"]]), adapter.embed_images(data["held_features"])
    found = recall_at(F.normalize(texts, dim=-1) @ images.T)
    return found["r1"], found["r10"]


def main() -> None:
    """Train with banks of several sizes and write results/training_bank.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cache", type=Path, default=Path("demo/cache"))
    parser.add_argument("--concepts", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lm, words = load_lm(options.cache)
    vision = load_vision()
    model, pairs = ground(lm, vision, words), Pairs(options.cache, vision, None)
    chosen = pairs.numbers("train")[:: max(1, len(pairs.numbers("train")) // options.concepts)][: options.concepts]
    held = pairs.numbers("validation") + pairs.numbers("test")
    texts = [text for i in chosen for text in emoji.captions(pairs.concepts[i])[:2]]
    held_texts, held_features = pairs.pairs(held)
    standardize_features(model.adapter, pairs.features[chosen].flatten(0, 1))
    data = {
        "states": states_at_ret(model, texts).view(len(chosen), 2, -1),
        "features": pairs.features[chosen],
        "held_states": states_at_ret(model, held_texts),
        "held_features": held_features,
    }
    results: dict = {"concepts": len(chosen), "held_out": len(held), "batch": BATCH, "steps": STEPS, "seeds": SEEDS}
    for size in (0, 128, 2 * len(chosen)):
        runs = [trained_recall(model, data, size, seed) for seed in range(SEEDS)]
        results[f"bank_{size}"] = {
            name: {"mean": round(statistics.mean(values), 2), "deviation": round(statistics.stdev(values), 2)}
            for name, values in zip(("r1", "r10"), zip(*runs, strict=True), strict=True)
        }
        print(size, results[f"bank_{size}"], file=sys.stderr, flush=True)
    write("training_bank", results)


if __name__ == "__main__":
    main()
