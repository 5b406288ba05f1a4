"""Loading vision encoders by name, or wrapping loaded ones, each with the preprocessing that belongs to it."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from visual_ground.errors import GroundingFileError, GroundingTypeError, GroundingValueError
from visual_ground.storage.hub_names import check_name, rooted
from visual_ground.vision.checkpoints import load_open_clip, load_timm
from visual_ground.vision.encoder import VisionEncoder
from visual_ground.vision.preprocessing import TransformProcessor

logger = logging.getLogger(__name__)


def load_vision(
    vision_encoder: str | nn.Module,
    image_processor: Any = None,
    revision: str | None = None,
    num_patch_tokens: int = 0,
    **hub: Any,
) -> VisionEncoder:
    """Load or wrap a vision encoder.

    Args:
        vision_encoder: a Hub id or folder, "open_clip:ARCHITECTURE/PRETRAINED", "timm:NAME", one of these with weights
            of your own (see `visual_ground.vision.checkpoints`), a loaded module, or a `VisionEncoder` made by hand. A
            Hub id or folder may end with "#SUBMODULE": "openai/clip-vit-large-patch14#vision_model" is CLIP's tower
            alone, before its projection.
        image_processor: maps a list of PIL images to `{"pixel_values": (n, c, h, w)}`; found where it can be.
        revision: of a Hub id.
        num_patch_tokens: parts of the picture to read besides the pooled features; 0 for none.
        hub: token, cache_dir and local_files_only, for transformers' `from_pretrained`.

    Raises:
        GroundingFileError: nothing can be loaded by that name.
        GroundingTypeError: neither a name nor a module, or no image encoder.
        GroundingValueError: no preprocessing can be found, or no features of a fixed width.
    """
    if isinstance(vision_encoder, VisionEncoder):
        given = vision_encoder
        if image_processor is None and given.num_patch_tokens == num_patch_tokens:
            return given
        given.release()
        processor = image_processor or given.image_processor
        return VisionEncoder(given.model, processor, given.name, None, num_patch_tokens, given.use_pooler)
    name = vision_encoder if isinstance(vision_encoder, str) else None
    use_pooler = True
    if name is not None:
        model, processor, use_pooler = _load_by_name(name, image_processor, {"revision": revision, **hub})
    elif isinstance(vision_encoder, nn.Module):
        model, processor = vision_encoder, image_processor or processor_of(vision_encoder)
    else:
        raise GroundingTypeError(f"vision_encoder must be a name or a module, got {type(vision_encoder).__name__}.")
    return VisionEncoder(model, processor, name and rooted(name), None, num_patch_tokens, use_pooler)


def _load_by_name(name: str, image_processor: Any, hub: dict[str, Any]) -> tuple[nn.Module, Any, bool]:
    """Return a model, its preprocessing, and whether its pooler was trained."""
    if name.startswith("open_clip:"):
        model, processor = load_open_clip(name.removeprefix("open_clip:"))
        return model, image_processor or processor, True
    if name.startswith("timm:"):
        model = load_timm(name.removeprefix("timm:"))
        return model, image_processor or processor_of(model), True
    from transformers import AutoModel

    name, _, part = name.partition("#")
    check_name(name, "vision encoder")
    try:
        model, loading = AutoModel.from_pretrained(name, output_loading_info=True, trust_remote_code=False, **hub)
    # A folder or file that is not of transformers is also a TypeError, or damaged JSON to it.
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        why = " ".join(str(error).split())
        raise GroundingFileError(
            f"The vision encoder {name!r} cannot be loaded: {why}. Those of other libraries are named timm:FOLDER, "
            "timm:ARCHITECTURE/FILE, open_clip:FOLDER or open_clip:ARCHITECTURE/FILE."
        ) from error
    missing = sorted(loading["missing_keys"])
    has_pooler = not any("pooler" in key for key in missing)
    if not has_pooler:
        logger.warning(
            "%s has no weights for the pooler of %s, which would be random: the mean of its tokens is taken instead.",
            name,
            type(model).__name__,
        )
    if others := [key for key in missing if "pooler" not in key]:
        logger.warning("%s lacks weights, which are random now: %s.", name, ", ".join(others[:10]))
    processor = image_processor or processor_of(model, name, **hub)
    try:
        return model.get_submodule(part).eval(), processor, has_pooler
    except AttributeError as error:
        children = [child for child, _ in model.named_children()]
        raise GroundingValueError(
            f"{name!r} has no submodule {part!r}; name one of {children}, or one inside them, after the #."
        ) from error


def processor_of(model: nn.Module, name: str | None = None, **hub: Any) -> Any:
    """Find the preprocessing that belongs to a loaded model of this name, or of that in its config where None."""
    if getattr(model, "pretrained_cfg", None) is not None:
        from timm import data

        # timm.data does not say what it exports.
        settings = data.resolve_data_config({}, model=model)  # type: ignore[attr-defined,no-untyped-call]
        return TransformProcessor(data.create_transform(**settings, is_training=False))  # type: ignore[attr-defined]
    visual = getattr(model, "visual", None)
    if visual is not None and hasattr(visual, "preprocess_cfg"):
        import open_clip

        settings = open_clip.transform.PreprocessCfg(**visual.preprocess_cfg)
        return TransformProcessor(open_clip.transform.image_transform_v2(settings, is_train=False))
    return _transformers_processor(
        model, str(name or getattr(getattr(model, "config", None), "_name_or_path", "")), hub
    )


def _transformers_processor(model: nn.Module, path: str, hub: dict[str, Any]) -> Any:
    """Return the processor saved at a path, else one of the kind that goes with the model's config."""
    from transformers import AutoImageProcessor

    reason: Exception | None = None
    if path:
        try:
            return AutoImageProcessor.from_pretrained(path, trust_remote_code=False, **hub)
        except (OSError, ValueError, ImportError) as error:
            reason = error
    if (default := _default_processor(getattr(model, "config", None))) is not None:
        logger.warning(
            "No preprocessing is saved with %s, so that of its kind is taken, %s with its default settings. Pass "
            "image_processor= where it was trained with another.",
            path or type(model).__name__,
            type(default).__name__,
        )
        return default
    raise GroundingValueError(
        f"No preprocessing is known for {type(model).__name__}. Pass image_processor=, which maps a list of PIL images "
        'to {"pixel_values": (n, c, h, w)}.'
    ) from reason


def _default_processor(config: Any) -> Any:
    """Return the processor that transformers pairs with a config, or with the model that this config is a part of."""
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    if config is None:
        return None
    classes = IMAGE_PROCESSOR_MAPPING.get(type(config), None)
    if classes is None:
        for whole in IMAGE_PROCESSOR_MAPPING.keys():
            if type(config) in getattr(whole, "sub_configs", {}).values():
                classes = IMAGE_PROCESSOR_MAPPING[whole]
                break
    # transformers 5 maps to a dict by backend, older versions to a pair (slow, fast).
    choices = list(classes.values()) if isinstance(classes, dict) else classes or ()
    processor_class: Any = next((choice for choice in choices if isinstance(choice, type)), None)
    if processor_class is None:
        return None
    try:
        default = processor_class()
    except TypeError:  # It has no defaults: transformers' processor for timm models needs to know the model.
        return None
    sizes = {name: _resized(getattr(default, name, None), _image_size(config)) for name in ("size", "crop_size")}
    return processor_class(**{name: size for name, size in sizes.items() if size is not None})


def _image_size(config: Any) -> tuple[int, int] | None:
    """Return the height and width that a config or its vision part names."""
    size = getattr(getattr(config, "vision_config", config), "image_size", None)
    if isinstance(size, int):
        return size, size
    return (int(size[0]), int(size[1])) if isinstance(size, (list, tuple)) and len(size) == 2 else None


def _resized(size: Any, image_size: tuple[int, int] | None) -> dict[str, int] | None:
    """Return a processor's size, a dict by its own keys, for images of another height and width."""
    if image_size is None or not callable(getattr(size, "get", None)):
        return None
    keys = {key for key in ("height", "width", "shortest_edge", "longest_edge") if size.get(key)}
    if "height" in keys:
        return {"height": image_size[0], "width": image_size[1]}
    return {"shortest_edge": min(image_size)} if keys == {"shortest_edge"} else None
