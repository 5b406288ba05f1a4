"""How often what the LM says of a picture holds the name of what it shows, or one of its keywords.

    RECIPE_CACHE=demo/cache python names.py ADAPTER [SPLIT]

Greedy, 24 tokens: behind the caption prompt, and as answers in a chat. Writes results/names.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from adapters import load_adapter
from image_tokens import names_said

COUNT = 100
BATCH = 20
QUESTIONS = ("What is in this picture?", "What is this?", "Describe this picture.")


@torch.no_grad()
def main() -> None:
    """Show, listen, count."""
    model, pairs = load_adapter(sys.argv[1])
    split = sys.argv[2] if len(sys.argv) > 2 else "test"
    sink, (before, after) = model.tokenizer.decode(model.processor.sink), model.config.image_prompt.split("{image}")
    asked = {"caption prompt": lambda image: [f"{sink}{before}", image, after]}
    for question in QUESTIONS:
        asked[question] = lambda image, text=question: [{"role": "user", "content": [image, f" {text}"]}]
    results = {}
    train = pairs.numbers("train")
    for kind, numbers in (("unseen", pairs.numbers(split)[:COUNT]), ("seen", train[:: len(train) // COUNT][:COUNT])):
        paths = [{"type": "image", "image": pairs.paths[i][n % 2]} for n, i in enumerate(numbers)]
        concepts = [pairs.concepts[i] for i in numbers]
        for name, prompt in asked.items():
            prompts, said = [prompt(path) for path in paths], []
            for start in range(0, len(prompts), BATCH):
                part = prompts[start : start + BATCH]
                said += model.generate(part, None, max_new_tokens=24, max_images=0, do_sample=False)
            texts = [answer.text for answer in said]
            of_name, of_either = names_said(concepts, texts)
            results[f"{kind}, {name}"] = {"name": of_name, "name_or_keyword": of_either, "such_as": texts[:3]}
            print(kind, name, of_name, of_either, flush=True)
    (Path(__file__).parent / "results" / "names.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
