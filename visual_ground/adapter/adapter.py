"""The adapter: everything that is trained, in one module whose `state_dict` is the saved file."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visual_ground.config import GroundingConfig
from visual_ground.lm.weights import EmbeddingStatistics
from visual_ground.regression import reduced_rank_regression

# How far image rows start from the mean embedding, in parts of the embedding's spread. Rows that start as far out as
# words do are noise that has to be unlearnt: benchmarks/start_values.py.
START_SPREAD = 0.1


def _in_float32(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep a method out of autocast: what is trained is computed in float32."""

    @functools.wraps(method)
    def computed(self: Adapter, *args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(self.logit_scale.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return computed


class Adapter(nn.Module):
    r"""Three linear layers, the `[RET]` rows and a temperature, in float32 whatever the LM's dtype.

    With image features :math:`x` (f), hidden states :math:`h_l` at `[RET]`, and the LM's embedding statistics
    :math:`\mu, \sigma` (Koh et al. 2023, section 3):

    .. math::
        rows = \mu + \sigma (W_c \hat x + b_c), \quad
        v = W_i \hat x + b_i, \quad t = \sum_l W_l \hat h_l + b_l

    :math:`v` and :math:`t` are then scaled to unit length. With `scaling="none"` the hats and :math:`\mu, \sigma` do
    nothing, which is the published method. With `scaling="embedding"`, :math:`\hat x` is standardised with the
    statistics of the training images and :math:`\hat h` has unit mean square, so one learning rate fits any LM and any
    encoder.

    Args:
        config: the settings.
        embedding_dim: d, width of the LM's input embedding.
        feature_dim: f, width of the vision encoder's features.
        patch_dim: with `visual_tokens_from="patches"`, the width of each of the k parts at the end of the features.
        text_dims: widths of the hidden states named by `config.text_layers`; the first -1 entry is h.
        head_dim: h, width of what the output head reads.
        tied: whether `[RET]`'s input and output row are one tensor.
    """

    embedding_mean: Tensor
    embedding_std: Tensor
    feature_mean: Tensor
    feature_std: Tensor
    ret_norms: Tensor

    def __init__(
        self,
        config: GroundingConfig,
        embedding_dim: int,
        feature_dim: int,
        text_dims: tuple[int, ...],
        head_dim: int,
        tied: bool,
        patch_dim: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.tied, self.patch_dim = config, tied, patch_dim
        self.embedding_dim, self.feature_dim = embedding_dim, feature_dim
        self.pooled_dim = feature_dim - config.num_patch_tokens * patch_dim
        if config.num_patch_tokens:
            self.image_projection = nn.Linear(patch_dim, embedding_dim)
        else:
            self.image_projection = nn.Linear(feature_dim, config.num_visual_tokens * embedding_dim)
        self.image_retrieval_projection = nn.Linear(self.pooled_dim, config.retrieval_dim)
        self.text_retrieval_projection = nn.ModuleList(nn.Linear(width, config.retrieval_dim) for width in text_dims)
        self.ret_input = nn.Parameter(torch.randn(embedding_dim) * 0.02)
        if not tied:
            self.ret_output = nn.Parameter(torch.randn(head_dim) * 0.02)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.register_buffer("embedding_mean", torch.zeros(embedding_dim))
        self.register_buffer("embedding_std", torch.ones(embedding_dim))
        self.register_buffer("feature_mean", torch.zeros(feature_dim))
        self.register_buffer("feature_std", torch.ones(feature_dim))
        self.register_buffer("ret_norms", torch.zeros(2))

    @_in_float32
    def image_tokens(self, features: Tensor) -> Tensor:
        """Map image features (n, f) to input rows (n * k, d)."""
        features = self.standardise(features)
        if self.config.num_patch_tokens:
            features = features[:, self.pooled_dim :].reshape(-1, self.patch_dim)
        rows = self.image_projection(features).view(-1, self.embedding_dim)
        return self.embedding_mean + self.embedding_std * rows

    @_in_float32
    def embed_images(self, features: Tensor) -> Tensor:
        """Map image features (n, f) to unit vectors (n, q)."""
        return F.normalize(self.image_retrieval_projection(self.standardise(features)[:, : self.pooled_dim]), dim=-1)

    @_in_float32
    def embed_states(self, states: list[Tensor]) -> Tensor:
        """Map the hidden states at `[RET]`, one (n, width) per text layer, to unit vectors (n, q)."""
        scaled = self.scale_states(states)
        mapped = [layer(state) for layer, state in zip(self.text_retrieval_projection, scaled, strict=True)]
        return F.normalize(torch.stack(mapped).sum(0), dim=-1)

    def scale_states(self, states: list[Tensor]) -> list[Tensor]:
        """Return the hidden states at `[RET]`, one (n, width) per layer, as the layers read them, in their dtype."""
        states = [state.to(self.logit_scale.dtype) for state in states]
        if self.config.scaling == "none":
            return states
        return [state * torch.rsqrt(state.square().mean(-1, keepdim=True) + 1e-6) for state in states]

    def ret_embeddings(self) -> tuple[Tensor, Tensor]:
        """Return `[RET]`'s input row (d,) and output row (h,)."""
        return self.ret_input, self.ret_input if self.tied else self.ret_output

    def standardise(self, features: Tensor) -> Tensor:
        """Return image features (n, f) as the linear layers read them, in their dtype."""
        return (features.to(self.feature_mean.dtype) - self.feature_mean) / self.feature_std

    def row_groups(self, rate: float) -> list[dict[str, Any]]:
        """Return an optimizer's parameter groups for the layer from images to input rows.

        A step of Adam moves every weight by about the learning rate, and so moves a row by up to f times that where the
        image tells, but only by once that where all images agree. The bias, which is all that they agree in, gets a
        rate of its own: a tenth of what the weights can do together.

        Args:
            rate: learning rate of the weights.
        """
        layer = self.image_projection
        return [{"params": [layer.weight], "lr": rate}, {"params": [layer.bias], "lr": rate * self.feature_dim / 10}]

    @torch.no_grad()
    def start_from_lm(self, embedding: EmbeddingStatistics, head: EmbeddingStatistics | None) -> None:
        """Set the start values from the LM's own rows; `scaling="none"` keeps only the norms.

        Args:
            embedding: statistics of the embedding module's output.
            head: statistics of the output head's rows, where they are not tied to the embedding.
        """
        head = embedding if head is None else head
        self.ret_norms.copy_(torch.tensor([embedding.mean_norm, head.mean_norm]))
        if self.config.scaling == "none":
            return
        self.embedding_mean.copy_(embedding.mean)
        self.embedding_std.copy_(embedding.std)
        self.ret_input.copy_(embedding.mean)
        if not self.tied:
            self.ret_output.copy_(head.mean)
        nn.init.normal_(self.image_projection.weight, std=START_SPREAD / math.sqrt(self.image_projection.in_features))
        nn.init.zeros_(self.image_projection.bias)
        self.renormalise_ret()

    @torch.no_grad()
    def standardise_with(self, features: Tensor) -> None:
        """Take the statistics of the training images' features (n, f) as the standardisation."""
        features = features.float()
        self.feature_mean.copy_(features.mean(0))
        # Pooled features and patches differ in scale, so each part has a floor of its own.
        parts = [part for part in features.tensor_split([self.pooled_dim], dim=1) if part.shape[1]]
        floored = [part.std(0, correction=0).clamp_min(1e-2 * part.std(correction=0) + 1e-6) for part in parts]
        self.feature_std.copy_(torch.cat(floored))

    @torch.no_grad()
    def start_retrieval(self, states: list[Tensor], features: Tensor, groups: Tensor | None = None) -> None:
        """Start both retrieval layers with `regression.reduced_rank_regression`.

        Args:
            states: the hidden states at `[RET]` of n texts, one (n, width) per text layer.
            features: (n, f), of their images.
            groups: (n,), equal where two pairs are about the same thing.
        """
        texts = torch.cat(self.scale_states(states), -1)
        pooled = self.standardise(features)[:, : self.pooled_dim]
        text, image = reduced_rank_regression(texts, pooled, self.config.retrieval_dim, groups)
        widths = [layer.in_features for layer in self.text_retrieval_projection]
        for i, (layer, weight) in enumerate(
            zip(self.text_retrieval_projection, text.weight.split(widths, -1), strict=True)
        ):
            _start_layer(layer, weight, text.bias if i == 0 else torch.zeros_like(text.bias))
        _start_layer(self.image_retrieval_projection, image.weight, image.bias)

    @torch.no_grad()
    def renormalise_ret(self) -> None:
        """Scale `[RET]`'s rows to the mean norm of the LM's own rows, as after every published training step."""
        for row, norm in zip(self.ret_embeddings()[: 1 if self.tied else 2], self.ret_norms, strict=False):
            row.mul_(norm / row.norm().clamp_min(1e-12))


def _start_layer(layer: Any, weight: Tensor, bias: Tensor) -> None:
    """Write start values; dimensions that the shared space lacks keep a little of the layer's random start."""
    blank = ~weight.any(-1, keepdim=True)
    layer.weight.copy_(torch.where(blank, layer.weight * weight.std(), weight))
    layer.bias.copy_(bias)
