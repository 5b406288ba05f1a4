"""Vectors of pictures that are moved towards those of their captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from visual_ground.errors import GroundingValueError

CAPTION_KEYS = ("caption", "title", "description", "text")  # Of metadata, the likeliest first.


class TextEmbedder(Protocol):
    """What captions need of a model, as `GroundedModel` has it."""

    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """Map n texts to unit vectors (n, q)."""


def check_weight(weight: float) -> None:
    """Raise GroundingValueError unless a `caption_weight` is from 0 to 1."""
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= 1:
        raise GroundingValueError(f"caption_weight must be a number from 0 to 1, got {weight!r}.")


def caption_of(metadata: Mapping[str, Any]) -> str | None:
    """Return the caption in an entry's metadata, if there is one.

    Example:
        >>> caption_of({"year": 1990, "title": "A cat"})
        'A cat'
    """
    values = {str(key).lower(): value for key, value in metadata.items()}
    return next((str(values[key]) for key in CAPTION_KEYS if values.get(key) not in (None, "")), None)


def with_captions(
    model: TextEmbedder, vectors: Tensor, metadata: Sequence[Mapping[str, Any]], weight: float, batch_size: int = 32
) -> Tensor:
    """Return normalize((1 - w) image + w caption) for entries that have a caption; the others stay as they are.

    Args:
        model: embeds the captions.
        vectors: (n, q) unit vectors of pictures.
        metadata: n mappings.
        weight: w, from 0 to 1.
        batch_size: captions that the LM reads at once.

    Returns:
        (n, q) unit vectors.
    """
    captions = {row: text for row, values in enumerate(metadata) if (text := caption_of(values)) is not None}
    if not weight or not captions:
        return vectors
    rows, texts, mixed = list(captions), list(captions.values()), vectors.clone()
    parts = [model.embed_text(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
    mixed[rows] = F.normalize((1 - weight) * vectors[rows] + weight * torch.cat(parts).to(vectors), dim=-1)
    return mixed
