"""`ground` and `unground`: attach an adapter between a language model and a vision encoder, and take it off."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from torch import nn

from visual_ground.adapter.initialization import initialize_from_lm
from visual_ground.components import load_components
from visual_ground.config import GroundingConfig
from visual_ground.errors import GroundingStateError, GroundingTypeError, GroundingValueError
from visual_ground.lm.attachment import virtual_tokens_of
from visual_ground.model import GroundedModel


def ground(
    lm: str | nn.Module,
    vision_encoder: Any = None,
    tokenizer: Any = None,
    image_processor: Any = None,
    config: GroundingConfig | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> GroundedModel:
    """Attach an adapter between a causal LM and a vision encoder; both stay frozen.

    Args:
        lm: Hub id, local folder, a GGUF file's path, or a loaded causal LM (quantised, offloaded, or a `PeftModel`).
        vision_encoder: Hub id or folder, "open_clip:ARCHITECTURE/PRETRAINED", "timm:NAME", a loaded model of one of
            these, or any module from pixels (n, c, h, w) to features (n, f).
        tokenizer: a tokenizer or its name; found by the LM's name if None.
        image_processor: maps a list of PIL images to `{"pixel_values": (n, c, h, w)}`; found if None.
        config: the settings; `GroundingConfig()` if None.
        adapter: local folder or Hub id of an adapter to start from, with its settings and, if none is passed, its
            encoder; a new adapter if None.

    Returns:
        The grounded model, whose adapter is ready to be trained: with its start values, or those it was saved with.

    Raises:
        GroundingTypeError: not a causal LM, or not a vision encoder.
        GroundingValueError: no tokenizer, preprocessing or feature width can be found; the tokenizer has `[RET]`.
        GroundingStateError: the LM is grounded already.
        GroundingFileError: no such adapter, or a damaged one.
    """
    if adapter is None:
        return _with_new_adapter(lm, vision_encoder, tokenizer, image_processor, config)
    if config is not None:
        raise GroundingValueError("A saved adapter has its own settings; pass config or adapter, not both.")
    return GroundedModel.from_pretrained(lm, adapter, vision_encoder, tokenizer, image_processor, is_trainable=True)


def unground(lm: nn.Module) -> nn.Module:
    """Take everything off a grounded LM and return it, bit for bit as it was; its `GroundedModel` is not needed.

    Args:
        lm: the LM; may be a `PeftModel`.

    Raises:
        GroundingTypeError: not a module.
        GroundingStateError: it is not grounded.

    Example:
        >>> lm = unground(ground("gpt2", "openai/clip-vit-base-patch32").lm)  # doctest: +SKIP
    """
    if not isinstance(lm, nn.Module):
        raise GroundingTypeError(f"unground takes the language model that was grounded, got {type(lm).__name__}.")
    tokens = virtual_tokens_of(lm)
    if tokens is None:
        raise GroundingStateError(f"This {type(lm).__name__} is not grounded, so there is nothing to take off.")
    tokens.detach()
    return lm


def _with_new_adapter(
    lm: str | nn.Module, vision_encoder: Any, tokenizer: Any, image_processor: Any, config: GroundingConfig | None
) -> GroundedModel:
    if vision_encoder is None:
        raise GroundingTypeError("ground needs a vision encoder, or an adapter that names one.")
    config = GroundingConfig() if config is None else config
    parts = load_components(lm, vision_encoder, tokenizer, image_processor, config)
    if config.retrieval_space == "encoder":
        config = replace(config, retrieval_dim=parts.vision.pooled_dim)
    model = GroundedModel(parts, config)
    try:
        initialize_from_lm(model.adapter, model.frozen_lm)
    except BaseException:
        model.unground()
        raise
    return model.train()
