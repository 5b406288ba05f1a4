"""The adapter: everything that is trained, in one module whose `state_dict` is the saved file."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visual_ground.adapter.encoder_space import EncoderSpace
from visual_ground.config import GroundingConfig
from visual_ground.errors import GroundingValueError

# The part of the state dict that does not depend on the LM: what a transfer to another LM copies.
IMAGE_SIDE = (
    "image_retrieval_projection.weight",
    "image_retrieval_projection.bias",
    "feature_mean",
    "feature_std",
    "logit_scale",
)
# Prefixes of the parameters whose widths are the LM's alone.
LM_SIDE = ("ret_input", "ret_output", "ret_gate_", "text_retrieval_projection.")
# What adapters lack that were saved before there was a gate, which is open for them.
NEWER = ("ret_gate_weight", "ret_gate_bias")


def _in_float32(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep a method out of autocast: what is trained is computed in float32."""

    @functools.wraps(method)
    def computed(self: Adapter, *args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(self.logit_scale.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return computed


class Adapter(nn.Module):
    r"""Three linear layers, the embeddings of `[RET]` and a temperature, in float32 whatever the LM's dtype.

    With image features :math:`x` (f), hidden states :math:`h_l` at the last word of the retrieval prompt (at `[RET]` if
    that prompt is empty), and the mean :math:`\mu` and standard deviation :math:`\sigma` of the LM's embedding (Koh et
    al. 2023, section 3):

    .. math::
        \text{tokens} = \mu + \sigma (W_c \hat x + b_c), \quad
        v = W_i \hat x + b_i, \quad t = \sum_l W_l \hat h_l + b_l

    :math:`v` and :math:`t` are then scaled to unit length. With `scaling="none"`, the published method, :math:`\hat x =
    x`, :math:`\hat h = h`, :math:`\mu = 0` and :math:`\sigma = 1`. With `scaling="embedding"`, :math:`\hat x` is
    standardised with the statistics of the training images and :math:`\hat h` has unit mean square, so that one
    learning rate fits any LM and any encoder.

    Args:
        config: the settings.
        embedding_dim: d, width of the LM's input embedding.
        feature_dim: f, width of the vision encoder's features.
        patch_dim: with `visual_tokens_from="patches"`, the width of each of the k parts at the end of the features.

    Attributes:
        kept: names of parameters that were fitted and that training leaves as they are; saved with the adapter.
        text_dims: widths of the hidden states named by `config.text_layers`; the first -1 entry is h.
        head_dim: h, width of what the output head reads.
        tied: whether `[RET]`'s input and output embedding are one tensor.
    """

    embedding_mean: Tensor
    embedding_std: Tensor
    feature_mean: Tensor
    feature_std: Tensor
    ret_norms: Tensor
    ret_gate_weight: Tensor
    ret_gate_bias: Tensor

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
        self.image_retrieval_projection = _retrieval_layer(config, self.pooled_dim)
        self.text_retrieval_projection = nn.ModuleList(nn.Linear(width, config.retrieval_dim) for width in text_dims)
        # Transformers' usual standard deviation of new embeddings; `initialization` replaces them.
        self.ret_input = nn.Parameter(torch.randn(embedding_dim) * 0.02)
        if not tied:
            self.ret_output = nn.Parameter(torch.randn(head_dim) * 0.02)
            # Fitted once and not trained, hence no parameters.
            self.register_buffer("ret_gate_weight", torch.zeros(head_dim))
            self.register_buffer("ret_gate_bias", torch.zeros(()))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP's start value, as published
        self.kept: frozenset[str] = frozenset()
        self.register_buffer("embedding_mean", torch.zeros(embedding_dim))
        self.register_buffer("embedding_std", torch.ones(embedding_dim))
        self.register_buffer("feature_mean", torch.zeros(feature_dim))
        self.register_buffer("feature_std", torch.ones(feature_dim))
        self.register_buffer("ret_norms", torch.zeros(2))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        """Move to another device, and stay in float32: `model.half()` and `.to(bfloat16)` are about the frozen parts.

        In half precision, a step of the optimizer is often too small to change a weight at all.
        """

        def keeping_dtype(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            narrower = changed.is_floating_point() and changed.dtype.itemsize < tensor.dtype.itemsize
            return tensor.to(changed.device) if narrower else changed

        super()._apply(keeping_dtype, recurse)  # type: ignore[no-untyped-call]  # torch's is untyped
        return self

    def keep(self, names: Iterable[str]) -> None:
        """Add parameters, by name, to those that training leaves as they are."""
        self.kept |= set(names)
        for name, parameter in self.named_parameters():
            if name in self.kept:
                parameter.requires_grad_(False)

    def set_trainable(self, is_trainable: bool) -> None:
        """Say whether it is trained; what is kept never is."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_trainable and name not in self.kept)

    @_in_float32
    def image_tokens(self, features: Tensor) -> Tensor:
        """Map image features (n, f) to image tokens, input embeddings (n * k, d)."""
        features = self.standardize(features)
        if self.config.num_patch_tokens:
            features = features[:, self.pooled_dim :].reshape(-1, self.patch_dim)
        tokens: Tensor = self.image_projection(features).view(-1, self.embedding_dim)
        tokens = self.embedding_mean + self.embedding_std * tokens
        return tokens

    @_in_float32
    def embed_images(self, features: Tensor) -> Tensor:
        """Map image features (n, f) to unit vectors (n, q)."""
        if self.config.retrieval_space == "encoder":  # Exactly, without the rounding of there and back.
            return F.normalize(features[:, : self.pooled_dim].to(self.feature_mean.dtype), dim=-1)
        return F.normalize(self.image_retrieval_projection(self.standardize(features)[:, : self.pooled_dim]), dim=-1)

    @_in_float32
    def embed_states(self, states: list[Tensor]) -> Tensor:
        """Map the hidden states at `[RET]`, one (n, width) per text layer, to unit vectors (n, q)."""
        scaled = self.scale_states(states)
        mapped = [layer(state) for layer, state in zip(self.text_retrieval_projection, scaled, strict=True)]
        return F.normalize(torch.stack(mapped).sum(0), dim=-1)

    def scale_states(self, states: list[Tensor]) -> list[Tensor]:
        """Scale hidden states at `[RET]`, one (n, width) per layer, to what the layers read, in the layers' dtype."""
        states = [state.to(self.logit_scale.dtype) for state in states]
        if self.config.scaling == "none":
            return states
        return [state * torch.rsqrt(state.square().mean(-1, keepdim=True) + 1e-6) for state in states]

    def ret_embeddings(self) -> tuple[Tensor, Tensor]:
        """Return `[RET]`'s input embedding (d,) and output embedding (h,)."""
        return self.ret_input, self.ret_input if self.tied else self.ret_output

    @property
    def has_ret_gate(self) -> bool:
        """Whether an answer's opening says if it may have pictures."""
        return not self.tied and bool(self.ret_gate_weight.any())

    @_in_float32
    def ret_gate(self, states: Tensor) -> Tensor:
        """Return what is added to `[RET]`'s logits in answers, (b,), at most 0, so that it shows only what is wanted.

        Args:
            states: (b, h), what the output head reads where the answers begin.
        """
        return (states.to(self.ret_gate_weight) @ self.ret_gate_weight + self.ret_gate_bias).clamp_max(0)

    def standardize(self, features: Tensor) -> Tensor:
        """Standardise image features (n, f) to what the linear layers read, in the layers' dtype."""
        standardised: Tensor = (features.to(self.feature_mean.dtype) - self.feature_mean) / self.feature_std
        return standardised

    def projector_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Return an optimizer's parameter groups for the layer from images to image tokens.

        A step of Adam moves every weight by about the learning rate. With f weights for each output, it can move by f
        times the rate what differs between images, but only by once the rate, through the bias, what all images have in
        common. So the bias gets a rate of its own: a tenth of what the weights can do together.

        Args:
            learning_rate: of the weights.
        """
        layer = self.image_projection
        bias = {"params": [layer.bias], "lr": learning_rate * self.feature_dim / 10}
        return [{"params": [layer.weight], "lr": learning_rate}, bias]

    @torch.no_grad()
    def renormalise_ret(self) -> None:
        """Scale `[RET]`'s embeddings to the mean norm of the LM's own, as after every published training step."""
        for embedding, norm in zip(self.ret_embeddings()[: 1 if self.tied else 2], self.ret_norms, strict=False):
            embedding.mul_(norm / embedding.norm().clamp_min(1e-12))


def _retrieval_layer(config: GroundingConfig, width: int) -> nn.Linear | EncoderSpace:
    """Return the layer from pooled features to the retrieval space; the encoder's own must be of the same width."""
    if config.retrieval_space != "encoder":
        return nn.Linear(width, config.retrieval_dim)
    if config.retrieval_dim != width:
        raise GroundingValueError(
            f'retrieval_space="encoder" takes the encoder\'s own vectors, which are {width} wide, and retrieval_dim is '
            f"{config.retrieval_dim}. Use the encoder that the adapter was made with, or retrieval_dim={width}."
        )
    return EncoderSpace(width)
