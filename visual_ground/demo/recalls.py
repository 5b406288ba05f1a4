"""How often the demo's texts find their pictures and pictures their texts, the adapter's and the baselines'.

Each figure is a mean over both captions of a concept and both drawings: four galleries, each of one way of drawing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from visual_ground.demo import emoji
from visual_ground.demo.baselines import bag_of_words_ridge, chance
from visual_ground.demo.pairs import CAPTION_KINDS, Pairs
from visual_ground.evaluation.metrics import recall_at
from visual_ground.model import GroundedModel

# Captions that the LM reads at once.
BATCH_SIZE = 64
Recalls = dict[str, dict[str, float]]


def adapter_recalls(model: GroundedModel, pairs: Pairs, numbers: Sequence[int]) -> Recalls:
    """Return the recalls both ways among these concepts."""
    texts = []
    for kind in CAPTION_KINDS:
        captions = pairs.captions(numbers, kind)
        parts = [captions[i : i + BATCH_SIZE] for i in range(0, len(captions), BATCH_SIZE)]
        texts.append(torch.cat([model.embed_text(part) for part in parts]))
    images = [model.embed_images(image_features=features) for features in pairs.galleries(numbers)]
    return _mean(text @ image.T for text in texts for image in images)


def baseline_recalls(pairs: Pairs, numbers: Sequence[int]) -> dict[str, Recalls]:
    """Return the recalls of bag of words with ridge regression, and of guessing; arguments as above."""
    trained = pairs.numbers("train")
    texts = [text for i in trained for text in emoji.captions(pairs.concepts[i])]
    features = pairs.features[trained].mean(1).repeat_interleave(len(texts) // len(trained), 0)
    scores = [
        bag_of_words_ridge(texts, features, pairs.captions(numbers, kind), gallery)
        for kind in CAPTION_KINDS
        for gallery in pairs.galleries(numbers)
    ]
    guess = chance(len(numbers))
    return {"bag_of_words_ridge": _mean(scores), "chance": {"text_to_image": guess, "image_to_text": guess}}


def _mean(scores: Iterable[Tensor]) -> Recalls:
    """Return the mean recalls both ways over matrices (texts, images) whose diagonals are right."""
    of_each = [{"text_to_image": recall_at(one), "image_to_text": recall_at(one.T)} for one in scores]
    return {
        way: {rank: sum(one[way][rank] for one in of_each) / len(of_each) for rank in ranks}
        for way, ranks in of_each[0].items()
    }
