"""Which words of captions tell an image from others, and image rows that begin as what these words are embedded as."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from visual_ground.model import GroundedModel
from visual_ground.regression import mean_and_std, ridge

# Rows are made as spread as the words that they are fitted to, but no more than so many times what was fitted: where
# images tell next to nothing of the words, there is only noise to enlarge.
SPREAD_AT_MOST = 10.0

Words = tuple[int, ...]


def caption_ids(
    model: GroundedModel, captions: Sequence[str], groups: Sequence[Hashable]
) -> dict[Hashable, list[Words]]:
    """Return the different captions of each group as ids, in the order in which they come."""
    said: dict[Hashable, dict[Words, None]] = {}
    for caption, group in zip(captions, groups, strict=True):
        said.setdefault(group, {})[tuple(model.processor.encode_text(" " + without_sentence_marks(caption)))] = None
    return {group: list(texts) for group, texts in said.items()}


def idf_weights(said: Mapping[Hashable, Sequence[Words]]) -> dict[int, float]:
    """Return each token's weight: the logarithm of the groups per group that has it.

    What most captions say tells no image from others. Where all captions are the same, all words weigh the same.
    """
    having = Counter(token for texts in said.values() for token in set(chain(*texts)))
    return {token: math.log(len(said) / count) + 1e-6 for token, count in having.items()}


def without_sentence_marks(caption: str) -> str:
    """Return a caption without the capital and the full stop that make it a sentence."""
    bare = caption.strip().rstrip(".!?,;: ") or caption
    return bare[0].lower() + bare[1:] if bare[1:2].islower() or bare[1:2] == " " else bare


@torch.no_grad()
def fit_image_tokens_to_words(
    model: GroundedModel, captions: Sequence[str], features: Tensor, groups: Sequence[Hashable]
) -> None:
    """Set the layer from images to input rows by ridge regression to the embeddings of the images' idf_weights words.

    An image's target is the mean embedding of its group's words, each by its weight. Rows lie around the adapter's
    embedding mean and as far from it as the targets from theirs, which ridge regression alone would shrink
    (benchmarks/transfer).

    Args:
        model: the grounded model.
        captions: n captions.
        features: (n, f), of their images.
        groups: n, equal where two captions are about the same thing.
    """
    adapter = model.adapter
    said = caption_ids(model, captions, groups)
    weight_of = idf_weights(said)
    number, targets = {group: i for i, group in enumerate(said)}, []
    for texts in said.values():
        ids = list(chain(*texts))
        weights = torch.tensor([weight_of[i] for i in ids])
        words = model.frozen_lm.embed(torch.tensor(ids)).float().cpu()
        targets.append(weights @ words / weights.sum())
    own = torch.tensor([number[group] for group in groups])
    rows = (torch.stack(targets) / adapter.embedding_std.clamp_min(1e-6).cpu())[own]
    read = adapter.standardize(features.to(adapter.feature_mean.device)).cpu()
    if patches := model.config.num_patch_tokens:
        # Every patch of an image is fitted to its words.
        read = read[:, adapter.pooled_dim :].reshape(-1, adapter.patch_dim)
        rows, own = rows.repeat_interleave(patches, 0), own.repeat_interleave(patches)
    middle, deviation = mean_and_std(read)
    even = (read - middle) / deviation
    fitted = ridge(even, rows, own)
    spread = rows.std(0, correction=0).norm() / fitted(even).std(0, correction=0).norm().clamp_min(1e-6)
    weight = spread.clamp_max(SPREAD_AT_MOST) * fitted.weight / deviation
    layer = adapter.image_projection
    copies = len(layer.weight) // len(weight)
    layer.weight.copy_(weight.repeat(copies, 1))
    layer.bias.copy_((-weight @ middle).repeat(copies))
