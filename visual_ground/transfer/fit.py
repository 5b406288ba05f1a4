"""What of a moved adapter meets the new language model, fitted to anchors: text layers, `[RET]`'s row, image rows."""

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

CAPTIONS_AT_ONCE = 128
CAPTION_LENGTH = 64
KEPT_BYTES = 4 * 2**30


@torch.no_grad()
def caption_states(model: GroundedModel, texts: Sequence[str], fit: bool = False) -> Tensor:
    """Return what the text layers read after each caption, (n, sum of the layers' widths); equal captions run once.

    Args:
        model: the grounded model.
        texts: n captions.
        fit: first turn `[RET]`'s row to where these captions are likely to be followed by it (`fitted_ret`), where the
            LM can run captions up to `[RET]` and go on from there.
    """
    different = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    places, texts = [different[text] for text in texts], list(different)
    collate = ExampleCollator(model, CAPTION_LENGTH, concat_captions_prob=0.0)
    starts = range(0, len(texts), CAPTIONS_AT_ONCE)
    batches = [collate.texts([{"caption": text} for text in texts[i : i + CAPTIONS_AT_ONCE]]) for i in starts]
    store = choose_prefix_cache(model, batches[0], KEPT_BYTES, packed=True)
    if store and fit:
        fit_ret(model.adapter, CaptionLikelihoods.joined([store.likelihoods(batch) for batch in batches]))
    parts = [store.states(batch) if store else plain_states(model, batch) for batch in batches]
    return torch.cat([torch.cat(model.adapter.scale_states(states), dim=-1).cpu() for states in parts])[places]


@torch.no_grad()
def fit_text_layers(model: GroundedModel, anchors: Anchors) -> None:
    """Set the text layers by ridge regression from the LM's states at `[RET]` to the anchors' image vectors.

    Args:
        model: the new model, whose image side is the old one's.
        anchors: captions and their images.
    """
    states = caption_states(model, anchors.texts, fit=True)
    vectors = model.embed_images(image_features=anchors.features).cpu()
    fitted = fit_states(states, vectors, anchors.images, anchors.groups)
    layers = model.adapter.text_retrieval_projection
    for layer, weight in zip(layers, fitted.weight.split(list(model.active.spec.text_dims), dim=1), strict=True):
        layer.weight.copy_(weight)
        layer.bias.zero_()
    layers[0].bias.copy_(fitted.bias)


def fit_states(states: Tensor, vectors: Tensor, images: Tensor, groups: Tensor | None = None) -> LinearMap:
    """Return the ridge layer from states (n, i) to the vectors (m, q) of their images.

    Its penalty is the one that ranks the right image best among all, for captions whose images it was not fitted to.

    Args:
        states: what the text layers read.
        vectors: unit vectors of the anchors' images.
        images: (n,), for each state its image.
        groups: (n,), equal where two states are about the same thing; by image where None.
    """
    middle, spread = mean_and_std(states)
    even = (states - middle) / spread

    def score(layer: LinearMap, held: Tensor) -> float:
        """Return minus the mean log rank of the right image among all anchors."""
        scores = F.normalize(layer(even[held]), dim=-1) @ vectors.T
        own = scores.gather(1, images[held][:, None])
        return -float((scores >= own).sum(1).double().log().mean())

    return ridge(even, vectors[images], images if groups is None else groups, score).unstandardize(middle, spread)


def fit_image_rows(model: GroundedModel, anchors: Anchors) -> None:
    """Set the image rows from the anchors' words, see `idf_weights.fit_image_tokens_to_words`."""
    features = anchors.features[anchors.images].float()
    fit_image_tokens_to_words(model, anchors.texts, features, anchors.groups.tolist())
