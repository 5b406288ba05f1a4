"""The parts of a moved adapter that depend on the language model, fitted to anchors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from visual_ground.adapter.anchors import Anchors
from visual_ground.model import GroundedModel
from visual_ground.regression import LinearMap, mean_and_std, ridge
from visual_ground.training.data.examples import ExampleCollator
from visual_ground.training.initialization.idf import fit_image_tokens_to_words
from visual_ground.training.initialization.ret_token import fit_ret
from visual_ground.training.losses.compute_plan import choose_prefix_cache
from visual_ground.training.losses.retrieval import CaptionLikelihoods, plain_states

CAPTIONS_PER_BATCH = 128
# Longer captions are cut, as in training.
MAX_CAPTION_LENGTH = 64
# Room for the captions' keys and values, so that each caption runs through the LM once for both fits.
CACHE_BYTES = 4 * 2**30


@torch.no_grad()
def caption_states(model: GroundedModel, captions: Sequence[str], fit_ret_token: bool = False) -> Tensor:
    """Return what the text layers read at a `[RET]` after each caption, (n, sum of the layers' widths).

    Equal captions run once.

    Args:
        model: the grounded model.
        captions: n captions.
        fit_ret_token: first fit the embedding of `[RET]`, so that it is likely after these captions
            (`initialization.ret_token`), if the LM can run captions up to `[RET]` and go on from there.
    """
    position = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    unique, positions = list(position), [position[caption] for caption in captions]
    collate = ExampleCollator(model, MAX_CAPTION_LENGTH, concat_captions_prob=0.0)
    starts = range(0, len(unique), CAPTIONS_PER_BATCH)
    chunks = [unique[i : i + CAPTIONS_PER_BATCH] for i in starts]
    batches = [collate.texts([{"caption": caption} for caption in chunk]) for chunk in chunks]
    cache = choose_prefix_cache(model, batches[0], CACHE_BYTES, packed=True)
    if cache and fit_ret_token:
        fit_ret(model.adapter, CaptionLikelihoods.joined([cache.likelihoods(batch) for batch in batches]))
    states = [cache.states(batch) if cache else plain_states(model, batch) for batch in batches]
    scaled = [torch.cat(model.adapter.scale_states(layers), dim=-1).cpu() for layers in states]
    return torch.cat(scaled)[positions]


@torch.no_grad()
def fit_text_layers(model: GroundedModel, anchors: Anchors) -> None:
    """Set the text layers by ridge regression from the LM's states at `[RET]` to the anchors' image vectors."""
    states = caption_states(model, anchors.texts, fit_ret_token=True)
    vectors = model.embed_images(image_features=anchors.features).cpu()
    fitted = fit_states(states, vectors, anchors.images, anchors.groups)
    layers = model.adapter.text_retrieval_projection
    weights = torch.split(fitted.weight, list(model.active.spec.text_dims), dim=1)
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight.copy_(weight)
        layer.bias.zero_()
    # The layers' outputs are summed, so one bias is enough for all of them.
    layers[0].bias.copy_(fitted.bias)


def fit_states(states: Tensor, vectors: Tensor, images: Tensor, groups: Tensor | None = None) -> LinearMap:
    """Return the ridge regression from states (n, i) to the vectors (m, q) of their images.

    Its penalty is the one with which held-out captions rank their own image best among all.

    Args:
        states: what the text layers read.
        vectors: unit vectors of the anchors' images.
        images: (n,), the number of each state's image.
        groups: (n,), equal where two states are about the same thing; None: one group an image.
    """
    mean, std = mean_and_std(states)
    standardized = (states - mean) / std

    def score(layer: LinearMap, held_out: Tensor) -> float:
        """Return minus the mean log rank of the right image among all anchors."""
        cosines = F.normalize(layer(standardized[held_out]), dim=-1) @ vectors.T
        right = cosines.gather(1, images[held_out][:, None])
        return -float((cosines >= right).sum(1).double().log().mean())

    return ridge(standardized, vectors[images], images if groups is None else groups, score).unstandardize(mean, std)


def fit_image_tokens(model: GroundedModel, anchors: Anchors) -> None:
    """Set the image tokens from the anchors' words, see `initialization.idf.fit_image_tokens_to_words`."""
    features = anchors.features[anchors.images].float()
    fit_image_tokens_to_words(model, anchors.texts, features, anchors.groups.tolist())
