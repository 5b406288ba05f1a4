"""The start values of an adapter, from the LM's embedding, the images' features, and pairs of text and image."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from visual_ground.adapter.adapter import Adapter
from visual_ground.adapter.encoder_space import EncoderSpace
from visual_ground.lm.base.weights import EmbeddingStatistics, embedding_vectors, head_vectors
from visual_ground.lm.frozen_lm import FrozenLM
from visual_ground.shared_space.accumulator import SharedSpace

# How far image tokens start from the mean embedding, as a fraction of the embedding's standard deviation. Tokens that
# start as far out as words do are noise that has to be unlearnt: benchmarks/start_values.py.
TOKEN_STD = 0.1
# Smallest standard deviation of a feature, as a fraction of that of all features: a feature that hardly varies among
# the training images must not be blown up where it does.
FEATURE_STD_FLOOR = 1e-2


@torch.no_grad()
def initialize_from_lm(adapter: Adapter, frozen_lm: FrozenLM) -> None:
    """Set a new adapter's start values from the LM's own embeddings; `scaling="none"` takes only their norms."""
    lm, spec, vocabulary = frozen_lm.lm, frozen_lm.spec, frozen_lm.vocabulary
    count = min(vocabulary.num_rows, vocabulary.num_tokens)
    with frozen_lm.bare():
        embedding = EmbeddingStatistics.of(embedding_vectors(lm, count))
        head = None if spec.tied else EmbeddingStatistics.of(head_vectors(lm, count, spec.head_dim))
    initialize_from_statistics(adapter, embedding, head)


@torch.no_grad()
def initialize_from_statistics(
    adapter: Adapter, embedding: EmbeddingStatistics, head: EmbeddingStatistics | None
) -> None:
    """As `initialize_from_lm`, from statistics that are known.

    Args:
        adapter: a new adapter.
        embedding: statistics of the embedding module's output.
        head: statistics of the output head's rows; None if they are tied to the embedding.
    """
    head = embedding if head is None else head
    adapter.ret_norms.copy_(torch.tensor([embedding.mean_norm, head.mean_norm]))
    if adapter.config.scaling == "none":
        return
    adapter.embedding_mean.copy_(embedding.mean)
    adapter.embedding_std.copy_(embedding.std)
    adapter.ret_input.copy_(embedding.mean)
    if not adapter.tied:
        adapter.ret_output.copy_(head.mean)
    projection = adapter.image_projection
    nn.init.normal_(projection.weight, std=TOKEN_STD / math.sqrt(projection.in_features))
    nn.init.zeros_(projection.bias)
    adapter.renormalise_ret()


@torch.no_grad()
def standardize_features(adapter: Adapter, features: Tensor) -> None:
    """Let the adapter standardise features with the mean and standard deviation of the training images' (n, f)."""
    features = features.float()
    adapter.feature_mean.copy_(features.mean(0))
    # Pooled features and patches differ in scale, so each part has a floor of its own.
    parts = [part for part in features.tensor_split([adapter.pooled_dim], dim=1) if part.shape[1]]
    floors = [FEATURE_STD_FLOOR * part.std(correction=0) + 1e-6 for part in parts]
    stds = [part.std(0, correction=0).clamp_min(floor) for part, floor in zip(parts, floors, strict=True)]
    adapter.feature_std.copy_(torch.cat(stds))
    if isinstance(space := adapter.image_retrieval_projection, EncoderSpace):
        space.undo(adapter.feature_mean[: adapter.pooled_dim], adapter.feature_std[: adapter.pooled_dim])


@torch.no_grad()
def retrieval_inputs(adapter: Adapter, states: list[Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the retrieval layers read: of texts (n, sum of the widths), and of images (n, pooled width).

    In the encoder's own space, images are their vectors there, to which the text layers are fitted.

    Args:
        adapter: the adapter.
        states: the states of n texts, one (n, width) per text layer.
        features: (n, f), of their images.
    """
    features = features.to(adapter.feature_mean.device)
    if adapter.config.retrieval_space == "encoder":
        return torch.cat(adapter.scale_states(states), -1), adapter.embed_images(features)
    return torch.cat(adapter.scale_states(states), -1), adapter.standardize(features)[:, : adapter.pooled_dim]


@torch.no_grad()
def initialize_retrieval(adapter: Adapter, space: SharedSpace) -> None:
    """Write a shared space, fitted to `retrieval_inputs`, into the retrieval layers."""
    layers: list[Any] = list(adapter.text_retrieval_projection)
    weights = torch.split(space.text.weight, [layer.in_features for layer in layers], -1)
    # The layers' outputs are summed, so one bias is enough for all of them.
    biases = [space.text.bias, *[torch.zeros_like(space.text.bias)] * (len(layers) - 1)]
    for layer, weight, bias in zip(layers, weights, biases, strict=True):
        _write_layer(layer, weight.to(layer.weight), bias.to(layer.bias))
    image = adapter.image_retrieval_projection
    if isinstance(image, EncoderSpace):
        return
    _write_layer(image, space.image.weight.to(image.weight), space.image.bias.to(image.bias))


def _write_layer(layer: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    """Write a layer's weight (q, width) and bias (q,).

    Dimensions that the shared space lacks keep a little of the layer's random values, or training could not use them.
    """
    is_missing = ~weight.any(-1, keepdim=True)
    layer.weight.copy_(torch.where(is_missing, layer.weight * weight.std(), weight))
    layer.bias.copy_(bias)
