"""A saved adapter on the demo's models, with the demo's data."""

from __future__ import annotations

from lm import CACHE

from visual_ground import GroundedModel
from visual_ground.demo.pairs import Pairs
from visual_ground.demo.weights import load_lm, load_vision


def load_adapter(folder: str) -> tuple[GroundedModel, Pairs]:
    """Return the grounded model of an adapter's folder, and the demo's concepts with their pictures."""
    lm, tokenizer = load_lm(CACHE)
    vision = load_vision(CACHE)
    return GroundedModel.from_pretrained(lm, folder, vision, tokenizer), Pairs(CACHE, vision, None)
