"""An adapter moves to another language model: the image side stays as it is, the rest is fitted to the new LM.

The layer from images to the retrieval space does not depend on the LM. It is copied and kept frozen, so that every
index built with the old model is valid for the new one. What depends on the LM is fitted to anchors: the text layers
and the image tokens in closed form, the embedding of `[RET]` by a convex minimisation that does not run the LM.
Training after that was measured to gain nothing (docs/transfer.md).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from visual_ground.adapter.adapter import IMAGE_SIDE, Adapter
from visual_ground.adapter.anchors import Anchors
from visual_ground.adapter.initialization import initialize_from_lm
from visual_ground.components import load_components
from visual_ground.config import GroundingConfig
from visual_ground.errors import GroundingValueError
from visual_ground.model import GroundedModel
from visual_ground.transferring.fit import fit_image_tokens, fit_text_layers
from visual_ground.transferring.image_side import ImageSide

# With another value of these, the vectors in existing image indexes would mean something else.
FIXED_SETTINGS = {"retrieval_dim", "retrieval_space", "scaling"}


def transfer(
    adapter: str | os.PathLike[str] | GroundedModel | ImageSide,
    lm: str | nn.Module,
    tokenizer: Any = None,
    anchors: Anchors | None = None,
    vision_encoder: Any = None,
    image_processor: Any = None,
    **changes: Any,
) -> GroundedModel:
    """Ground another LM with an adapter's image side; image indexes of the old model stay valid.

    Args:
        adapter: local folder or Hub id, a grounded model, which stays as it is, or what `ImageSide.load` gives.
        lm: as in `ground`.
        tokenizer: as in `ground`.
        anchors: captions and image features to fit with; None: those saved with the adapter.
        vision_encoder: as in `ground`; None: the adapter's own.
        image_processor: as in `ground`.
        changes: settings that are to differ, such as `text_layers`; `retrieval_dim`, `retrieval_space` and
            `scaling` cannot.

    Returns:
        The grounded model, whose image side is frozen and whose other parts can be trained.

    Raises:
        GroundingFileError: no such adapter, a damaged one, or an encoder that cannot be loaded.
        GroundingValueError: no anchors, anchors of another encoder, or a change that would make indexes invalid.
        GroundingTypeError, GroundingStateError: as in `ground`.
    """
    side = _image_side_of(adapter)
    anchors = _checked_anchors(side, anchors, changes)
    model = _attach(side, lm, tokenizer, vision_encoder, image_processor, replace(side.config, **changes))
    try:
        _fit(model, side, anchors)
    except BaseException:
        model.unground()
        raise
    return model.train()


def _fit(model: GroundedModel, side: ImageSide, anchors: Anchors) -> None:
    _check_width("vision encoder gives", model.vision.feature_dim, side)
    initialize_from_lm(model.adapter, model.frozen_lm)
    _copy_image_side(model.adapter, side)
    fit_text_layers(model, anchors)
    fit_image_tokens(model, anchors)
    model.active.anchors = anchors


def _image_side_of(adapter: str | os.PathLike[str] | GroundedModel | ImageSide) -> ImageSide:
    if isinstance(adapter, ImageSide):
        return adapter
    return ImageSide.of(adapter) if isinstance(adapter, GroundedModel) else ImageSide.load(adapter)


def _checked_anchors(side: ImageSide, anchors: Anchors | None, changes: Mapping[str, Any]) -> Anchors:
    """Return the anchors to fit with, after everything that can be checked before a model is loaded."""
    anchors = side.anchors if anchors is None else anchors
    if anchors is None:
        raise GroundingValueError(
            "This adapter was saved without anchors, which a transfer needs. Make some of image-caption pairs of your "
            "own with visual_ground.transferring.collect.collect_anchors, and pass anchors=."
        )
    _check_width("anchors have", anchors.features.shape[1], side)
    if fixed := sorted(FIXED_SETTINGS & set(changes)):
        raise GroundingValueError(
            f"A transfer cannot change {fixed}: image indexes would not be valid any more. Leave them out."
        )
    return anchors


def _check_width(what: str, width: int, side: ImageSide) -> None:
    expected = len(side.tensors["feature_mean"])
    if width != expected:
        raise GroundingValueError(
            f"The {what} {width} features per image, the adapter reads {expected}. Use the vision encoder that it was "
            "trained with."
        )


def _attach(
    side: ImageSide, lm: Any, tokenizer: Any, vision_encoder: Any, image_processor: Any, config: GroundingConfig
) -> GroundedModel:
    """Attach a new adapter between the LM and the adapter's own vision encoder, or the one that is given."""
    vision = side.vision if vision_encoder is None else vision_encoder
    components = load_components(lm, vision, tokenizer, image_processor, config, side.provenance, side.hub)
    if vision_encoder is None:
        # An encoder that is passed on as an object no longer knows which revision it was loaded from.
        encoder = {name: side.provenance.get(name) for name in ("vision_encoder", "vision_revision")}
        components = replace(components, provenance={**components.provenance, **encoder})
    return GroundedModel(components, config)


@torch.no_grad()
def _copy_image_side(adapter: Adapter, side: ImageSide) -> None:
    state = adapter.state_dict()
    for name in IMAGE_SIDE:
        state[name].copy_(side.tensors[name])
    adapter.keep(name for name, _ in adapter.named_parameters() if name.startswith("image_retrieval_projection."))
