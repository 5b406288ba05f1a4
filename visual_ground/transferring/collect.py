"""Anchors made of image-caption pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from visual_ground.adapter.anchors import Anchors
from visual_ground.errors import GroundingValueError
from visual_ground.training.data.columns import Columns
from visual_ground.vision.encoder import VisionEncoder

# Images that are decoded and encoded at once: few enough for any memory.
BATCH_SIZE = 32


def collect_anchors(
    dataset: Sequence[Mapping[str, Any]], vision: VisionEncoder, columns: Columns | None = None
) -> Anchors:
    """Run the encoder over a dataset's images and keep their features and captions; of several images, the first.

    Args:
        dataset: mappings by number with images and captions, as `GroundingTrainer` takes them.
        vision: the encoder that the adapter was trained with.
        columns: where the images and captions are; None: `image` and `caption`.

    Raises:
        GroundingValueError: no examples, no such columns, or an example without a caption.
    """
    columns = columns or Columns()
    if not len(dataset):
        raise GroundingValueError("Anchors need at least one example with an image and a caption.")
    if missing := [name for name in (columns.image, columns.caption) if name not in dataset[0]]:
        raise GroundingValueError(f"The dataset has no columns {missing}; its columns are {sorted(dataset[0])}.")
    features, captions = [], []
    for start in range(0, len(dataset), BATCH_SIZE):
        examples = [dataset[i] for i in range(start, min(start + BATCH_SIZE, len(dataset)))]
        features.append(vision(vision.preprocess([columns.images(example)[0] for example in examples])).cpu())
        captions += [columns.captions(example) for example in examples]
    return Anchors(captions, torch.cat(features))
