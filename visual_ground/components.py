"""The parts of a grounded model: found by name or taken as given, and checked before anything is attached."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from visual_ground.adapter.attached import AttachedAdapter, new_adapter
from visual_ground.adapter.files import AdapterFiles
from visual_ground.config import GroundingConfig
from visual_ground.errors import GroundingFileError, GroundingStateError, GroundingTypeError, GroundingValueError
from visual_ground.lm.attachment import detach_orphans
from visual_ground.lm.base import peft as lm_peft
from visual_ground.lm.base.loading import load_lm
from visual_ground.lm.base.spec import LMSpec, read_spec
from visual_ground.lm.frozen_lm import FrozenLM
from visual_ground.storage.hub import HubOptions, cached_commit
from visual_ground.storage.hub_names import rooted
from visual_ground.vision.encoder import VisionEncoder
from visual_ground.vision.loading import load_vision


@dataclass(frozen=True)
class Components:
    """A frozen LM, a vision encoder, and what was read of them.

    Args:
        lm: a causal LM, untouched.
        tokenizer: its tokenizer.
        vision: the encoder.
        spec: what was read of the LM.
        provenance: `base_model_name_or_path`, `revision`, `vision_encoder`, `vision_revision`, or None.
    """

    lm: nn.Module
    tokenizer: Any
    vision: VisionEncoder
    spec: LMSpec
    provenance: Mapping[str, str | None]


def load_components(
    lm: str | nn.Module | None,
    vision_encoder: Any,
    tokenizer: Any,
    image_processor: Any,
    config: GroundingConfig,
    named: Mapping[str, str | None] | None = None,
    hub: Mapping[str, Any] | None = None,
) -> Components:
    """Load and check the parts of a grounded model, given as to `ground`; nothing is attached.

    Where the LM or the encoder is None, it is the one that a saved adapter names: `named` is as
    `Components.provenance`, and `hub` has token, cache_dir and local_files_only.

    Raises:
        GroundingFileError: a part that the adapter names cannot be loaded.
        GroundingTypeError, GroundingValueError, GroundingStateError: as in `ground`.
    """
    if not isinstance(config, GroundingConfig):
        raise GroundingTypeError(f"config must be a GroundingConfig, got {type(config).__name__}.")
    named, hub = named or {}, hub or {}
    lm, tokenizer, provenance = _load_language_model(lm, tokenizer, named, hub)
    if detach_orphans(lm):
        raise GroundingStateError(
            "This LM is grounded already. Call unground() on its GroundedModel first, or visual_ground.unground(lm)."
        )
    check_tokens(tokenizer, config)
    vision, commit = load_encoder(vision_encoder, image_processor, config, named, hub)
    provenance |= {"vision_encoder": vision.name, "vision_revision": commit}
    return Components(lm, tokenizer, vision, read_spec(lm, tokenizer, config.text_layers), provenance)


def _load_language_model(
    lm: str | nn.Module | None, tokenizer: Any, named: Mapping[str, str | None], hub: Mapping[str, Any]
) -> tuple[nn.Module, Any, dict[str, str | None]]:
    """Return the LM, its tokenizer, and its name and commit where it has such."""
    name = named.get("base_model_name_or_path") if lm is None else lm if isinstance(lm, str) else None
    if lm is not None:
        lm, tokenizer = load_lm(lm, tokenizer)
        commit = cached_commit(name) if name else getattr(lm.config, "_commit_hash", None)
    elif name is not None:
        commit = named.get("revision")
        lm, tokenizer = load_lm(name, tokenizer, commit, **hub)
    else:
        raise GroundingValueError("This adapter was trained on a language model that no name can load. Pass it first.")
    name = name or getattr(lm.config, "_name_or_path", None) or None
    return lm, tokenizer, {"base_model_name_or_path": name and rooted(name), "revision": commit}


def check_tokens(tokenizer: Any, config: GroundingConfig) -> None:
    """Raise GroundingValueError where the tokenizer has `[RET]` already, or makes nothing of the retrieval prompt."""
    if config.ret_token in tokenizer.get_vocab():
        raise GroundingValueError(
            f"The tokenizer has the token {config.ret_token!r} already. Choose another GroundingConfig.ret_token."
        )
    prompt = config.retrieval_prompt
    if prompt and not tokenizer(" " + prompt.strip(), add_special_tokens=False)["input_ids"]:
        raise GroundingValueError(
            f"The tokenizer makes no tokens of the retrieval prompt {prompt!r}. Use words that it knows, or "
            'retrieval_prompt="" to read the state at the retrieval token itself.'
        )


def load_encoder(
    vision_encoder: Any,
    image_processor: Any,
    config: GroundingConfig,
    named: Mapping[str, str | None] | None = None,
    hub: Mapping[str, Any] | None = None,
) -> tuple[VisionEncoder, str | None]:
    """Load and check a vision encoder; the arguments are those of `load_components`.

    Returns:
        The encoder, and the commit of the Hub that it is of, where there is one.
    """
    if vision_encoder is not None:
        vision = load_vision(vision_encoder, image_processor, num_patch_tokens=config.num_patch_tokens)
        return vision, cached_commit(vision.name) if vision.name else None
    named, hub = named or {}, hub or {}
    name, commit = named.get("vision_encoder"), named.get("vision_revision")
    if name is None:
        raise GroundingValueError(
            "This adapter was trained with a vision encoder that no name can load. Pass vision_encoder=, or --vision "
            "in a command: the name or path by which that encoder is loaded."
        )
    try:
        return load_vision(name, image_processor, commit, config.num_patch_tokens, **hub), commit
    # open_clip, timm and transformers fail in ways of their own where a name, a file or the network is wrong.
    except Exception as error:
        raise GroundingFileError(
            f"The vision encoder {name!r}, which the adapter names, cannot be loaded: {error}. Pass "
            "vision_encoder=, or --vision in a command."
        ) from error


def load_saved_components(
    lm: str | nn.Module,
    model_id: str | os.PathLike[str] | None,
    vision_encoder: Any,
    tokenizer: Any,
    image_processor: Any,
    options: HubOptions,
) -> tuple[Components, AdapterFiles]:
    """Load the components for a saved adapter, and check that it fits them; the arguments are as in `from_pretrained`.

    Returns:
        The components, with the saved PEFT adapter in the LM where the adapter was trained with one; and the files.
    """
    if model_id is None and not isinstance(lm, (str, os.PathLike)):
        raise GroundingTypeError("Which adapter? Pass a local folder or a Hub id after the language model.")
    name: Any = lm if model_id is None else model_id
    files = AdapterFiles.open(name, options)
    given = None if model_id is None else lm, vision_encoder, tokenizer, image_processor
    parts = load_components(*given, files.config, files.provenance, options.for_models())
    check_fits(files, parts.spec, parts.vision, parts.provenance["base_model_name_or_path"])
    if files.config.train_lm_adapter:
        parts = replace(parts, lm=lm_peft.attach(parts.lm, files.folder))
    return parts, files


def components_beside(
    frozen_lm: FrozenLM,
    active: AttachedAdapter,
    config: GroundingConfig,
    vision_encoder: Any = None,
    image_processor: Any = None,
    files: AdapterFiles | None = None,
) -> Components:
    """Load the components of one more adapter on a grounded LM, and check that they fit it; nothing is attached.

    `active` is an adapter on the LM, and `files` what was saved of the new one, if anything. The other arguments are as
    in `load_components`.
    """
    tokenizer = active.processor.tokenizer
    check_tokens(tokenizer, config)
    named = None if files is None else files.provenance
    vision, commit = load_encoder(vision_encoder, image_processor, config, named)
    with frozen_lm.bare():
        spec = read_spec(frozen_lm.lm, tokenizer, config.text_layers)
    if files is not None:
        check_fits(files, spec, vision, active.provenance.get("base_model_name_or_path"))
    provenance = {**active.provenance, "vision_encoder": vision.name, "vision_revision": commit}
    return Components(frozen_lm.lm, tokenizer, vision, spec, provenance)


def check_fits(files: AdapterFiles, spec: LMSpec, vision: VisionEncoder, lm: str | None = None) -> None:
    """Raise GroundingValueError where an adapter has other widths than an LM (named `lm`) and an encoder need."""
    with torch.device("meta"):
        files.check_fits(new_adapter(files.metadata.config, spec, vision), lm)
