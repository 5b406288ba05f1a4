"""`fit` alone, through the package, on the demo's pairs: recalls on the test split, as in recipe.md's table.

    RECIPE_CACHE=demo/cache python accept.py SEED [gemma3]

One wording of a request is fitted to for each concept, chosen by the seed. Writes results/accept_LM_SEED.json.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "transfer"))
import common
from data import REPORTED, Data
from fitting import ranks, recall
from lm import CACHE

from visual_ground import GroundingTrainingArguments, fit, ground
from visual_ground.demo import emoji
from visual_ground.demo.templates import REQUESTS
from visual_ground.demo.weights import load_vision
from visual_ground.lm.base.loading import multiplies_bfloat16


def rows_of(data: Data, seed: int) -> list[dict]:
    """Return the training rows: two captions and a request for each concept, each with both drawings."""
    rows = []
    for i in data.split["train"]:
        concept = data.concepts[i]
        asked = concept.fill(concept.pick(REQUESTS, f"fit{seed}"))
        texts = [{"caption": text} for text in emoji.captions(concept)[:2]]
        texts.append({"caption": emoji.captions(concept)[0], "request": asked})
        for style in data.features[i]:
            rows += [{**text, "image_features": style, "group": concept.code} for text in texts]
    return rows


@torch.no_grad()
def report(model, data: Data) -> dict:
    """Return the recalls at 1, 5 and 10, in percent, over both captions and both drawings."""
    train, test = torch.tensor(data.split["train"]), torch.tensor(data.split["test"])
    images = [model.embed_images(image_features=data.features[:, style]) for style in (0, 1)]

    def embedded(texts: list) -> torch.Tensor:
        return torch.cat([model.embed_text(texts[i : i + 32]) for i in range(0, len(texts), 32)])

    def both_ways(places: torch.Tensor) -> dict:
        of_all = [data.captions(kind) for kind in (0, 1)]
        captions = [embedded([of_kind[i] for i in places.tolist()]) for of_kind in of_all]
        pairs = [(text, image[places]) for text in captions for image in images]
        return {
            "text_to_image": recall(torch.cat([ranks(text @ image.T) for text, image in pairs])),
            "image_to_text": recall(torch.cat([ranks(image @ text.T) for text, image in pairs])),
        }

    captions = {"unseen_of_150": both_ways(test), "seen_of_150": both_ways(train[:150])}
    if not data.tokenizer.chat_template:
        return captions
    asked = data.picked(REPORTED, "reporta")
    everything = torch.cat([train, test])
    requests = embedded([[{"role": "user", "content": asked[i]}] for i in everything.tolist()])
    unseen = requests[len(train) :]
    return {
        **captions,
        "requests_in_new_words_seen_of_all": recall(
            torch.cat([ranks(requests[: len(train)] @ image[everything].T) for image in images])
        ),
        "requests_in_new_words_unseen_of_150": recall(torch.cat([ranks(unseen @ image[test].T) for image in images])),
    }


def main() -> None:
    """Fit, measure, write."""
    seed, name = int(sys.argv[1]), (*sys.argv[2:], "smollm2")[0]
    common.CACHE = CACHE
    lm, tokenizer = common.load_lm(name)
    model, data = ground(lm, load_vision(), tokenizer), Data(tokenizer)
    with tempfile.TemporaryDirectory() as out:
        args = GroundingTrainingArguments(
            output_dir=out, use_cpu=True, prefix_cache_gb=2, disable_tqdm=True, bf16=multiplies_bfloat16()
        )
        start, wall = time.process_time(), time.perf_counter()
        fit(model, rows_of(data, seed), args)
        seconds = {"cpu": round(time.process_time() - start), "wall": round(time.perf_counter() - wall)}
    found = {"lm": name, "seed": seed, "retrieval_prompt": model.config.retrieval_prompt, "fit_seconds": seconds}
    found |= report(model.eval(), data)
    print(json.dumps(found, indent=1))
    (Path(__file__).parent / "results" / f"accept_{name}_{seed}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
