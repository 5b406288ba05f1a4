"""Caption pairs: how many the LM's likelihoods tell apart, and how many the retrieval vectors of the same adapter do.

    RECIPE_CACHE=demo/cache python caption_pairs.py ADAPTER [SPLIT]

The second is what the shared space knows of the same captions and pictures. Writes results/caption_pairs_SPLIT.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from adapters import load_adapter

from visual_ground.evaluation.captions import caption_pair_accuracy, draw_from_other_groups

WRONG = 4


@torch.no_grad()
def main() -> None:
    """Compare, write."""
    model, pairs = load_adapter(sys.argv[1])
    split = sys.argv[2] if len(sys.argv) > 2 else "test"
    captions, features = pairs.pairs(pairs.numbers(split))
    texts = torch.cat([model.embed_text(captions[i : i + 32]) for i in range(0, len(captions), 32)])
    images, draw = model.embed_images(image_features=features), torch.Generator().manual_seed(0)
    right = (texts * images).sum(-1)
    # The same wrong images as in `caption_pair_accuracy`, and then all.
    drawn = [images[draw_from_other_groups(torch.arange(len(texts)), draw)] for _ in range(WRONG)]
    wins = torch.stack([right > (texts * wrong).sum(-1) for wrong in drawn])
    others = ~torch.eye(len(texts), dtype=torch.bool)
    found = {
        "captions": len(captions),
        "likelihoods": round(caption_pair_accuracy(model, captions, features, WRONG), 1),
        "retrieval_vectors": round(100 * float(wins.double().mean()), 1),
        "retrieval_vectors_all_wrong_images": round(
            100 * float((right[:, None] > texts @ images.T)[others].double().mean()), 1
        ),
    }
    print(json.dumps(found, indent=1))
    (Path(__file__).parent / "results" / f"caption_pairs_{split}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
