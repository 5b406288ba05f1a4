"""Retrieval: how often a caption finds its image among all others, and an image its caption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visual_ground.errors import GroundingValueError
from visual_ground.evaluation.metrics import retrieval_recalls
from visual_ground.evaluation.pairs import EvaluationPairs, Pairs
from visual_ground.model import GroundedModel


class RetrievalEvaluator:
    """Recall at 1, 5 and 10 over all pairs, in percent, both ways; an `Evaluator`.

    Args:
        pairs: images with captions.
        name: tells the metrics from another evaluator's.
        batch_size: captions that the LM reads at once.

    Example:
        >>> RetrievalEvaluator(validation_rows)(model)  # doctest: +SKIP
        {'text_to_image_r1': 21.5, ..., 'image_to_text_r10': 60.0}
    """

    primary_metric = "text_to_image_r1"

    def __init__(self, pairs: Pairs | EvaluationPairs, name: str = "retrieval", batch_size: int = 64) -> None:
        self.pairs, self.name, self.batch_size = EvaluationPairs.of(pairs), name, batch_size

    def __call__(self, model: GroundedModel) -> dict[str, float]:
        """Return `text_to_image_r<k>` and `image_to_text_r<k>`."""
        captions, features = self.pairs.read(model)
        recalls = retrieval_recall(model, captions, features, self.batch_size, self.pairs.groups)
        return {f"{way}_{rank}": value for way, values in recalls.items() for rank, value in values.items()}


def retrieval_recall(
    model: GroundedModel,
    texts: Sequence[Any],
    features: Tensor,
    batch_size: int = 64,
    groups: Tensor | None = None,
) -> dict[str, dict[str, float]]:
    """Return `{"text_to_image": recalls, "image_to_text": recalls}` of pairs, in percent.

    Args:
        model: the grounded model.
        texts: n prompts, as in `GroundedModel.embed_text`.
        features: (n, f), their images' features.
        batch_size: prompts that the LM reads at once.
        groups: (n,), equal if two pairs are about the same image; if None, pairs of equal features are.

    Raises:
        GroundingValueError: no pairs, or not as many texts as images.
    """
    if len(texts) != len(features) or not len(texts):
        raise GroundingValueError(
            f"Pairs have as many texts as images, and there must be some, got {len(texts)} texts and {len(features)} "
            "images. Give one image for each text."
        )
    starts = range(0, len(texts), batch_size)
    vectors = torch.cat([model.embed_text(list(texts[i : i + batch_size])) for i in starts])
    if groups is None:
        groups = torch.unique(features, dim=0, return_inverse=True)[1]
    return retrieval_recalls(vectors, model.embed_images(image_features=features), groups)
