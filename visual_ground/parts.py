"""The parts of a grounded model: found by name or taken as given, and checked before anything is attached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from visual_ground.adapter import Adapter
from visual_ground.config import GroundingConfig
from visual_ground.errors import GroundingFileError, GroundingStateError, GroundingTypeError, GroundingValueError
from visual_ground.hub import cached_commit
from visual_ground.language import LanguageFacts, load_language_model, read_facts
from visual_ground.virtual_rows import is_attached
from visual_ground.vision import VisionEncoder, load_vision


@dataclass(frozen=True)
class Parts:
    """A frozen LM, a vision encoder, and what was read of them.

    Args:
        lm: a causal LM, untouched.
        tokenizer: its tokenizer.
        vision: the encoder.
        facts: what was read of the LM.
        names: `base_model_name_or_path`, `revision`, `vision_encoder`, `vision_revision`; None where there is none.
    """

    lm: nn.Module
    tokenizer: Any
    vision: VisionEncoder
    facts: LanguageFacts
    names: Mapping[str, str | None]


def find_parts(
    lm: str | nn.Module | None,
    vision_encoder: Any,
    tokenizer: Any,
    image_processor: Any,
    config: GroundingConfig,
    named: Mapping[str, str | None] | None = None,
    hub: Mapping[str, Any] | None = None,
) -> Parts:
    """Load and check the parts of a grounded model; nothing is attached.

    Args:
        lm: as in `ground`; None takes the one that the adapter names.
        vision_encoder: likewise.
        tokenizer: as in `ground`.
        image_processor: as in `ground`.
        config: the settings.
        named: what a saved adapter says of its parts, as in `Parts.names`.
        hub: token, cache_dir and local_files_only, for what the adapter names.

    Raises:
        GroundingFileError: a part that the adapter names cannot be loaded.
        GroundingTypeError, GroundingValueError, GroundingStateError: as in `ground`.
    """
    if not isinstance(config, GroundingConfig):
        raise GroundingTypeError(f"config must be a GroundingConfig, got {type(config).__name__}.")
    named, hub = named or {}, hub or {}
    if lm is None:
        lm, tokenizer = _named_language_model(named, tokenizer, hub)
        commit = named.get("revision")
    else:
        name = lm if isinstance(lm, str) else None
        lm, tokenizer = load_language_model(lm, tokenizer)
        commit = cached_commit(name) if name else getattr(lm.config, "_commit_hash", None)
    if is_attached(lm):
        raise GroundingStateError("This LM is grounded already. Call unground() on its GroundedModel first.")
    if config.ret_token in tokenizer.get_vocab():
        raise GroundingValueError(
            f"The tokenizer has the token {config.ret_token!r} already. Choose another GroundingConfig.ret_token."
        )
    if vision_encoder is None:
        vision, vision_commit = _named_vision(named, image_processor, hub), named.get("vision_revision")
    else:
        vision = load_vision(vision_encoder, image_processor)
        vision_commit = cached_commit(vision.name) if vision.name else None
    names = {
        "base_model_name_or_path": getattr(lm.config, "_name_or_path", None) or None,
        "revision": commit,
        "vision_encoder": vision.name,
        "vision_revision": vision_commit,
    }
    return Parts(lm, tokenizer, vision, read_facts(lm, tokenizer, config.text_layers), names)


def _named_language_model(
    named: Mapping[str, str | None], tokenizer: Any, hub: Mapping[str, Any]
) -> tuple[nn.Module, Any]:
    name = named.get("base_model_name_or_path")
    if name is None:
        raise GroundingValueError("This adapter was trained on a language model that no name can load. Pass it first.")
    return load_language_model(name, tokenizer, named.get("revision"), **hub)


def _named_vision(named: Mapping[str, str | None], image_processor: Any, hub: Mapping[str, Any]) -> VisionEncoder:
    name = named.get("vision_encoder")
    if name is None:
        raise GroundingValueError(
            "This adapter was trained with a vision encoder that no name can load. Pass vision_encoder=."
        )
    try:
        return load_vision(name, image_processor, named.get("vision_revision"), **hub)
    # open_clip, timm and transformers fail in ways of their own where a name, a file or the network is wrong.
    except Exception as error:
        raise GroundingFileError(
            f"The vision encoder {name!r}, which the adapter names, cannot be loaded: {error}. Pass vision_encoder=."
        ) from error


def new_adapter(config: GroundingConfig, facts: LanguageFacts, feature_dim: int) -> Adapter:
    """Return an adapter of the widths that fit an LM and an encoder.

    Args:
        config: the settings.
        facts: what was read of the LM.
        feature_dim: f, width of the encoder's features.
    """
    return Adapter(config, facts.embedding_dim, feature_dim, facts.text_dims, facts.head_dim, facts.tied)
