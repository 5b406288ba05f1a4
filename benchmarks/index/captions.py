"""What captions add to an index of pictures: `caption_weight` on the demo's data, after `make demo`.

python -m benchmarks.index.captions --output benchmarks/index/results/captions.json

An entry of the index is OpenMoji's drawing of a concept, and its caption the concept's name. Queries are requests in
words that nothing was fitted on, with the name; keywords, none of which is in the name; and Twemoji's drawing. In
"a third of the captions wrong", every third entry has another one's caption.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch.nn import functional as F

from visual_ground.demo.pairs import Pairs
from visual_ground.demo.saved import load_demo
from visual_ground.demo.templates import UNFITTED_REQUESTS

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
AT_ONCE, WRONG = 64, 3


def recalls(queries, gallery, wanted) -> str:
    """Return R@1 and R@5 in percent, of queries (n, q) whose entries in the gallery (m, q) are `wanted`."""
    best = (queries @ gallery.T).topk(5).indices
    hit = best == torch.tensor(wanted)[:, None]
    return f"{100 * hit[:, 0].float().mean():.1f} / {100 * hit.any(1).float().mean():.1f}"


@torch.no_grad()
def measure(folder: Path) -> dict[str, object]:
    """Return the recalls by set of concepts, quality of captions, kind of query, and weight."""
    model, _ = load_demo(folder, folder / "cache")
    pairs = Pairs(folder / "cache", model.vision, None)

    def embed(texts):
        parts = [texts[start : start + AT_ONCE] for start in range(0, len(texts), AT_ONCE)]
        return torch.cat([model.embed_text(part) for part in parts])

    images = model.embed_images(image_features=pairs.features[:, 0])
    captions = embed([concept.name for concept in pairs.concepts])
    wrong = captions.clone()
    wrong[::WRONG] = captions[::WRONG].roll(1, 0)
    result: dict[str, object] = {"pictures": len(images), "weights": list(WEIGHTS), "recall": "R@1 / R@5 in percent"}
    unseen = pairs.numbers("test")
    for name, numbers in (("unseen", unseen), ("seen", pairs.numbers("train")[: len(unseen)])):
        concepts = [pairs.concepts[i] for i in numbers]
        described = [i for i in numbers if pairs.concepts[i].keywords]
        requests = embed([concept.fill(concept.pick(UNFITTED_REQUESTS)) for concept in concepts])
        keywords = embed([", ".join(pairs.concepts[i].keywords[:3]) for i in described])
        drawings = model.embed_images(image_features=pairs.features[numbers, 1])
        queries = {
            "requests with the name": (requests, numbers),
            "keywords": (keywords, described),
            "pictures": (drawings, numbers),
        }
        for quality, texts in (("right captions", captions), ("a third of the captions wrong", wrong)):
            galleries = [F.normalize((1 - weight) * images + weight * texts, dim=-1) for weight in WEIGHTS]
            result[f"{name}, {quality}"] = {
                kind: [recalls(vectors, gallery, wanted) for gallery in galleries]
                for kind, (vectors, wanted) in queries.items()
            }
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, default=Path("demo"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    text = json.dumps(measure(options.demo), indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")
