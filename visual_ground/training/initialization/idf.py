"""IDF weights of caption words, and image tokens that start as the weighted mean embedding of their captions' words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from visual_ground.model import GroundedModel
from visual_ground.regression import mean_and_std, ridge

# Ridge regression shrinks its predictions; they are scaled back to their targets' standard deviation, but at most by
# this factor: where images predict next to nothing of the words, only noise would be enlarged.
MAX_SCALE = 10.0

TokenIds = tuple[int, ...]


def caption_ids(
    model: GroundedModel, captions: Sequence[str], groups: Sequence[Hashable]
) -> dict[Hashable, list[TokenIds]]:
    """Return the different captions of each group as token ids, in order of appearance."""
    ids_of: dict[Hashable, dict[TokenIds, None]] = {}
    for caption, group in zip(captions, groups, strict=True):
        ids = tuple(model.processor.encode_text(" " + without_sentence_marks(caption)))
        ids_of.setdefault(group, {})[ids] = None
    return {group: list(ids) for group, ids in ids_of.items()}


def idf_weights(ids_of: Mapping[Hashable, Sequence[TokenIds]]) -> dict[int, float]:
    """Return each token's inverse document frequency, log(N / df), where every group of captions is one document.

    If all captions are the same, all tokens weigh the same.
    """
    document_frequency = Counter(token for captions in ids_of.values() for token in set(chain(*captions)))
    return {token: math.log(len(ids_of) / df) + 1e-6 for token, df in document_frequency.items()}


def without_sentence_marks(caption: str) -> str:
    """Return a caption without the capital letter and the full stop that make it a sentence."""
    bare = caption.strip().rstrip(".!?,;: ") or caption
    return bare[0].lower() + bare[1:] if bare[1:2].islower() or bare[1:2] == " " else bare


@torch.no_grad()
def fit_image_tokens_to_words(
    model: GroundedModel, captions: Sequence[str], features: Tensor, groups: Sequence[Hashable]
) -> None:
    """Fit the image projection by ridge regression to the idf-weighted mean embeddings of each group's words.

    The image tokens get the embeddings' mean and the targets' standard deviation, which ridge regression alone would
    shrink (benchmarks/transfer).

    Args:
        model: the grounded model.
        captions: n captions.
        features: (n, f), of their images.
        groups: n, equal if two captions are about the same thing.
    """
    adapter, ids_of = model.adapter, caption_ids(model, captions, groups)
    number = {group: i for i, group in enumerate(ids_of)}
    of_group = torch.tensor([number[group] for group in groups])
    targets = (_mean_embeddings(model, ids_of) / adapter.embedding_std.clamp_min(1e-6).cpu())[of_group]
    inputs = adapter.standardize(features.to(adapter.feature_mean.device)).cpu()
    if patches := model.config.num_patch_tokens:
        # Every patch of an image is fitted to the same words.
        inputs = inputs[:, adapter.pooled_dim :].reshape(-1, adapter.patch_dim)
        targets, of_group = targets.repeat_interleave(patches, 0), of_group.repeat_interleave(patches)
    mean, std = mean_and_std(inputs)
    standardised = (inputs - mean) / std
    fitted = ridge(standardised, targets, of_group)
    scale = targets.std(0, correction=0).norm() / fitted(standardised).std(0, correction=0).norm().clamp_min(1e-6)
    weight = scale.clamp_max(MAX_SCALE) * fitted.weight / std
    layer = adapter.image_projection
    # All tokens of an image start alike.
    copies = len(layer.weight) // len(weight)
    layer.weight.copy_(weight.repeat(copies, 1))
    layer.bias.copy_((-weight @ mean).repeat(copies))


def _mean_embeddings(model: GroundedModel, ids_of: Mapping[Hashable, Sequence[TokenIds]]) -> Tensor:
    """Return for each group the idf-weighted mean embedding of its captions' tokens, (groups, d)."""
    weight_of, means = idf_weights(ids_of), []
    for captions in ids_of.values():
        ids = list(chain(*captions))
        weights = torch.tensor([weight_of[i] for i in ids])
        embeddings = model.frozen_lm.embed(torch.tensor(ids)).float().cpu()
        means.append(weights @ embeddings / weights.sum())
    return torch.stack(means)
