"""The mean and standard deviation of the training images' features."""

from __future__ import annotations

from typing import Any

import torch

from visual_ground.adapter.initialization import standardize_features
from visual_ground.evaluation.pairs import image_features
from visual_ground.model import GroundedModel
from visual_ground.training.data.examples import ExampleDataset
from visual_ground.training.data.reading import without_prompt
from visual_ground.training.data.streams import ExampleStream

# Images whose features give the mean and standard deviation: cached ones cost only a read, others run the encoder.
MAX_CACHED_STATISTICS = 65_536
MAX_UNCACHED_STATISTICS = 1024


def first_examples(examples: ExampleDataset | ExampleStream, count: int) -> list[dict[str, Any]]:
    """Return the first examples without their prompts, fewer if there are fewer."""
    if isinstance(examples, ExampleStream):
        return [without_prompt(example) for example in examples.take(count)]
    return [without_prompt(examples[i]) for i in range(min(len(examples), count))]


@torch.no_grad()
def standardise(model: GroundedModel, examples: ExampleDataset | ExampleStream) -> bool:
    """Give a new adapter the mean and standard deviation of the training images' features.

    They are those of up to 65,536 images, or of 1,024 if the features are not cached.

    Args:
        model: the grounded model.
        examples: the training examples.

    Returns:
        Whether the adapter was new.
    """
    adapter = model.adapter
    is_new = not adapter.feature_mean.any() and bool((adapter.feature_std == 1).all())
    # A transferred adapter's image side is frozen, and standardises features already.
    frozen = not all(parameter.requires_grad for parameter in adapter.image_retrieval_projection.parameters())
    if model.config.scaling != "embedding" or not is_new or frozen:
        return False
    sample = getattr(examples.features, "sample", None)
    if sample is None:
        features = image_features(model, first_examples(examples, MAX_UNCACHED_STATISTICS))
    else:
        features = sample(MAX_CACHED_STATISTICS)
    standardize_features(adapter, features.to(adapter.feature_mean.device))
    return True
