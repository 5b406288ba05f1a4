"""Which start values matter, on the demo's weights and pictures (run `make demo` first, for its caches).

    python benchmarks/start_values.py

Prompts: with the mean embedding of a name's tokens in the image's place, in how many percent of 100 validation
concepts is the right caption likelier than with the next concept's embedding? Spread: the captioning loss of the last
ten of 30 steps of 32 name captions, with image rows that start at the mean embedding plus that part of the spread.
"""

from __future__ import annotations

from pathlib import Path

import torch
from measure import write

from visual_ground import GroundedModel, ground
from visual_ground.adapter.initialization import standardize_features
from visual_ground.demo import emoji
from visual_ground.demo.pairs import Pairs
from visual_ground.demo.weights import load_lm, load_vision
from visual_ground.prompts.encoded import EncodedPrompt
from visual_ground.training.data.examples import ExampleCollator
from visual_ground.training.losses.captioning import captioning_loss

CACHE = Path("demo/cache")
PROMPTS = ("{image}Image:", "Image:{image}", "Image:{image}\nCaption:", "Image of {image}:")
SPREADS = (0.0, 0.1, 1.0)


@torch.no_grad()
def prompt_accuracy(model: GroundedModel, concepts: list[emoji.Concept], prompt: str) -> float:
    """Return the percentage of captions that are likelier after their own name's embedding than after another's."""
    encoder, table = model.processor, model.lm.get_input_embeddings().weight
    rows = torch.stack([table[encoder.encode_text(" " + concept.name)].mean(0) for concept in concepts])
    before, _, after = prompt.partition("{image}")
    lead = [*encoder.sink, *encoder.encode_text(before), -1, *encoder.encode_text(after)]
    tails = [encoder.encode_text(" " + emoji.captions(concept)[0]) for concept in concepts]
    batch = encoder.batch([EncodedPrompt((*lead, *tail), ()) for tail in tails])
    inputs, lengths = (batch["input_ids"], batch["attention_mask"]), [len(tail) for tail in tails]
    own, other = (model.frozen_lm.log_likelihood(*inputs, lengths, given) for given in (rows, rows.roll(-1, 0)))
    return round(100 * float((own > other).float().mean()), 1)


def loss_with_spread(model: GroundedModel, pairs: Pairs, spread: float, steps: int = 30) -> float:
    """Train the image rows from this spread; return the mean loss of the last ten steps."""
    adapter, trained = model.adapter, pairs.numbers("train")
    torch.manual_seed(0)
    with torch.no_grad():
        adapter.image_projection.weight.normal_(0, spread / adapter.feature_dim**0.5)
        adapter.image_projection.bias.zero_()
    standardize_features(adapter, pairs.features[trained].flatten(0, 1))
    optimizer = torch.optim.AdamW(adapter.image_projection.parameters(), lr=1e-3, weight_decay=0)
    collate, losses = ExampleCollator(model, concat_captions_prob=0.0), []
    for _ in range(steps):
        chosen = [trained[i] for i in torch.randint(len(trained), (32,)).tolist()]
        examples = [
            {
                "row": i,
                "group": i,
                "caption": emoji.captions(pairs.concepts[i])[0],
                "image_features": pairs.features[i, 0],
            }
            for i in chosen
        ]
        batch = collate(examples)
        loss = captioning_loss(model, batch["captioning"], batch["image_features"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return round(sum(losses[-10:]) / 10, 3)


if __name__ == "__main__":
    lm, tokenizer = load_lm(CACHE)
    vision = load_vision()
    model, pairs = ground(lm, vision, tokenizer), Pairs(CACHE, vision, None)
    held_out = [pairs.concepts[i] for i in pairs.numbers("validation")]
    accuracies = {prompt: prompt_accuracy(model, held_out, prompt) for prompt in PROMPTS}
    losses = {str(spread): loss_with_spread(model, pairs, spread) for spread in SPREADS}
    write(
        "start_values",
        {
            "prompt_pair_accuracy": accuracies,
            "captioning_loss_by_spread": losses,
        },
    )
