"""Vision encoders: whatever is given becomes one frozen module from pixels (n, c, h, w) to features (n, f)."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from visual_ground.errors import GroundingTypeError, GroundingValueError
from visual_ground.images import to_rgb


class VisionEncoder(nn.Module):
    """A frozen encoder with its preprocessing and the width of its features.

    Args:
        model: a transformers, open_clip or timm model, or any module from pixels (n, c, h, w) to features (n, f).
        image_processor: maps a list of PIL images to `{"pixel_values": (n, c, h, w)}`.
        name: the string it was loaded by, or None.

    Raises:
        GroundingValueError: no features of a fixed width can be got from it.
    """

    def __init__(self, model: nn.Module, image_processor: Any, name: str | None = None) -> None:
        super().__init__()
        self.model, self.image_processor, self.name = model, image_processor, name
        self.feature_dim = self._probe()

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map pixels (n, c, h, w) to features (n, f); no gradient ever flows here."""
        reference = next(self.model.parameters(), None)
        if reference is not None:
            pixel_values = pixel_values.to(reference.device, reference.dtype)
        if hasattr(self.model, "get_image_features"):
            output = self.model.get_image_features(pixel_values=pixel_values)
        elif hasattr(self.model, "encode_image"):
            output = self.model.encode_image(pixel_values)
        elif "pixel_values" in inspect.signature(self.model.forward).parameters:
            output = self.model(pixel_values=pixel_values)
        else:
            output = self.model(pixel_values)
        return pool(output)

    def preprocess(self, images: Sequence[Any]) -> Tensor:
        """Turn PIL images or paths into pixels (n, c, h, w)."""
        return self.image_processor([to_rgb(image) for image in images], return_tensors="pt")["pixel_values"]

    def _probe(self) -> int:
        """Return f, the width of the features of one grey image."""
        was_training = self.model.training
        self.model.eval()
        try:
            features = self(self.preprocess([Image.new("RGB", (64, 64), (128, 128, 128))]))
        except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
            raise GroundingValueError(
                f"{type(self.model).__name__} gave no features for a grey image ({type(error).__name__}: {error}). A "
                "vision encoder maps pixels (n, c, h, w) to features (n, f); give an image_processor that fits it."
            ) from error
        finally:
            self.model.train(was_training)
        return features.shape[1]


def pool(output: Any) -> Tensor:
    """Return pooled features (n, f) from whatever an encoder returned.

    Taken in this order: `image_embeds`, `pooler_output`, else the mean of `last_hidden_state` over its tokens or over
    height and width.
    """
    features: Tensor | None = output if isinstance(output, Tensor) else None
    if features is None:
        names = ("image_embeds", "pooler_output", "last_hidden_state")
        features = next((value for name in names if (value := getattr(output, name, None)) is not None), None)
    if features is None or not features.is_floating_point():
        raise GroundingTypeError(
            f"A vision encoder must return features (n, f), got {type(output).__name__}. Pass a tower that returns a "
            "tensor, image_embeds, pooler_output or last_hidden_state."
        )
    if features.dim() == 4:
        return features.flatten(2).mean(-1)
    return features.mean(1) if features.dim() == 3 else features


def load_vision(
    vision_encoder: str | nn.Module, image_processor: Any = None, revision: str | None = None, **hub: Any
) -> VisionEncoder:
    """Load or wrap a vision encoder.

    Args:
        vision_encoder: a Hub id or folder, "open_clip:ARCHITECTURE/PRETRAINED", "timm:NAME", or a loaded module. A Hub
            id or folder may end with "#SUBMODULE": "openai/clip-vit-large-patch14#vision_model" is CLIP's tower alone,
            before its projection.
        image_processor: maps a list of PIL images to `{"pixel_values": (n, c, h, w)}`; found where it can be.
        revision: of a Hub id.
        hub: token, cache_dir and local_files_only, for transformers' `from_pretrained`.

    Raises:
        GroundingTypeError: neither a name nor a module.
        GroundingValueError: no preprocessing can be found, or no features of a fixed width.
    """
    if isinstance(vision_encoder, VisionEncoder):
        return vision_encoder
    name = vision_encoder if isinstance(vision_encoder, str) else None
    if name is not None:
        model, found = _load_by_name(name, {"revision": revision, **hub})
    elif isinstance(vision_encoder, nn.Module):
        model, found = vision_encoder, None if image_processor is not None else _processor_of(vision_encoder)
    else:
        raise GroundingTypeError(f"vision_encoder must be a name or a module, got {type(vision_encoder).__name__}.")
    return VisionEncoder(model.eval(), image_processor or found, name)


def _load_by_name(name: str, hub: dict[str, Any]) -> tuple[nn.Module, Any]:
    if name.startswith("open_clip:"):
        import open_clip

        architecture, _, pretrained = name.removeprefix("open_clip:").partition("/")
        model, _, transform = open_clip.create_model_and_transforms(architecture, pretrained=pretrained or None)
        return model, TransformProcessor(transform)
    if name.startswith("timm:"):
        import timm

        model = timm.create_model(name.removeprefix("timm:"), pretrained=True, num_classes=0)
        return model, _processor_of(model)
    from transformers import AutoImageProcessor, AutoModel

    whole, _, part = name.partition("#")
    options = {**hub, "trust_remote_code": False}
    model = AutoModel.from_pretrained(whole, **options)
    processor = AutoImageProcessor.from_pretrained(whole, **options)
    try:
        return model.get_submodule(part), processor
    except AttributeError as error:
        inside = [child for child, _ in model.named_children()]
        raise GroundingValueError(f"{whole!r} has no submodule {part!r}; it has {inside}.") from error


def _processor_of(model: nn.Module) -> Any:
    """Find the preprocessing that belongs to a loaded model."""
    if getattr(model, "pretrained_cfg", None) is not None:
        from timm.data import create_transform, resolve_data_config

        return TransformProcessor(create_transform(**resolve_data_config({}, model=model), is_training=False))
    visual = getattr(model, "visual", None)
    if visual is not None and hasattr(visual, "preprocess_cfg"):
        import open_clip

        settings = open_clip.transform.PreprocessCfg(**visual.preprocess_cfg)
        return TransformProcessor(open_clip.transform.image_transform_v2(settings, is_train=False))
    path = getattr(getattr(model, "config", None), "_name_or_path", "")
    if path:
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(path)
    raise GroundingValueError(
        f"No preprocessing is known for {type(model).__name__}. Pass image_processor=, which maps a list of PIL images "
        'to {"pixel_values": (n, c, h, w)}.'
    )


class TransformProcessor:
    """A per-image transform, as open_clip and timm have them, with the interface of a transformers image processor."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, images: Sequence[Image.Image], return_tensors: str = "pt") -> dict[str, Tensor]:
        """Return `{"pixel_values": (n, c, h, w)}`."""
        return {"pixel_values": torch.stack([self.transform(image) for image in images])}
