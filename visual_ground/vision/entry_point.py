"""Where pixels go into a vision model: image features if a whole model offers them, else its vision tower."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def entry_of(model: nn.Module) -> Any:
    """Return what is called with pixels: image features if a whole model offers them, else the tower's forward."""
    if has_method(model, "get_image_features"):
        return _ImageFeatures(model)
    base = getattr(model, "base_model", model)
    candidates = [base if isinstance(base, nn.Module) else model, model]
    if has_method(model, "get_encoder"):
        get_encoder: Any = model.get_encoder
        candidates.append(get_encoder(modality="image"))
    reading_pixels = [part for part in candidates if "pixel_values" in parameter_names(part)]
    # A tower that reads pixels alone is better than a whole model, which would ask for text too.
    without_text = (part for part in reading_pixels if "input_ids" not in parameter_names(part))
    return next(without_text, (reading_pixels or candidates)[0])


class _ImageFeatures:
    """A whole text-and-image model, called for its image features only."""

    def __init__(self, model: Any) -> None:
        self.model, self.config, self.forward = model, model.config, model.get_image_features
        self.main_input_name = "pixel_values"

    def __call__(self, **inputs: Any) -> Any:
        return self.model.get_image_features(**inputs)

    def parameters(self) -> Any:
        return self.model.parameters()


def has_method(model: Any, name: str) -> bool:
    """Return whether a model has a method of this name."""
    return callable(getattr(model, name, None))


def parameter_names(entry: Any) -> set[str]:
    """Return the names of the arguments that an entry point's forward takes."""
    return set(inspect.signature(entry.forward).parameters)
