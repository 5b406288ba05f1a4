"""Where an answer's first picture is best searched from: what was asked, what was said, or both.

    RECIPE_CACHE=demo/cache python first_picture.py ADAPTER

Every seventh trained concept is asked for in words that were not fitted on; the frozen LM answers by itself. Read are
the vectors where the answer begins and behind its first sentence. Writes results/first_picture.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from adapters import load_adapter
from lm import CACHE
from torch import Tensor
from torch.nn.functional import normalize

from visual_ground import GroundedModel
from visual_ground.demo.emoji import stable_number
from visual_ground.demo.templates import UNFITTED_REQUESTS
from visual_ground.scoring.query_vectors import query_vectors
from visual_ground.training.initialization.answers import answers_to, place_of_picture

STEP = 7


def read(model: GroundedModel, contexts: list[tuple[int, ...]]) -> Tensor:
    """Return the vectors (n, q) read behind each context."""
    queries = [[*ids, *model.processor.retrieval_suffix(ids)] for ids in contexts]
    parts = [queries[i : i + 32] for i in range(0, len(queries), 32)]
    return torch.cat([query_vectors(model.frozen_lm, model.active, part, None) for part in parts])


def recall(vectors: Tensor, images: Tensor, numbers: list[int]) -> dict[str, float]:
    """Return R@1 and R@5 among all images, in percent."""
    scores = vectors @ images.T
    found = (scores > scores[range(len(numbers)), numbers][:, None] + 1e-6).sum(1)
    return {f"r{k}": round(100 * float((found < k).double().mean()), 1) for k in (1, 5)}


@torch.no_grad()
def main() -> None:
    """Ask, read, write."""
    model, pairs = load_adapter(sys.argv[1])
    numbers = pairs.numbers("train")[::STEP]
    concepts = [pairs.concepts[i] for i in numbers]
    asked = [c.fill(UNFITTED_REQUESTS[stable_number(c.code) % len(UNFITTED_REQUESTS)]) for c in concepts]
    answers = answers_to(model, asked, [], CACHE / "recipe")
    ends = [place_of_picture(model, answer) for answer in answers]
    whole = [i for i, end in enumerate(ends) if end]
    numbers = [numbers[i] for i in whole]
    opening = read(model, [answers[i].prompt for i in whole])
    behind = read(model, [(*answers[i].prompt, *answers[i].ids[: ends[i]]) for i in whole])
    images = model.embed_images(image_features=pairs.features[:, 0])
    found = {"asked": len(asked), "with_a_whole_sentence": len(whole), "pictures": len(images)}
    vectors = {"opening": opening, "behind_the_sentence": behind, "both": normalize(opening + behind, dim=-1)}
    found |= {name: recall(one, images, numbers) for name, one in vectors.items()}
    print(json.dumps(found, indent=1))
    (Path(__file__).parent / "results" / "first_picture.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
