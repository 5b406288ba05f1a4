"""Give any language model eyes, and let it answer with pictures, without touching its weights."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visual_ground.config import GroundingConfig
    from visual_ground.errors import GroundingError
    from visual_ground.generation.output import InterleavedOutput, RetrievedImage
    from visual_ground.grounding import ground
    from visual_ground.index.image_index import ImageIndex
    from visual_ground.model import GroundedModel
    from visual_ground.training import GroundingTrainer, GroundingTrainingArguments
    from visual_ground.transferring.transfer import transfer

_HOMES = {
    "GroundedModel": "model",
    "GroundingConfig": "config",
    "GroundingError": "errors",
    "GroundingTrainer": "training",
    "GroundingTrainingArguments": "training",
    "ImageIndex": "index.image_index",
    "InterleavedOutput": "generation.output",
    "RetrievedImage": "generation.output",
    "ground": "grounding",
    "transfer": "transferring.transfer",
}

__all__ = [
    "GroundedModel",
    "GroundingConfig",
    "GroundingError",
    "GroundingTrainer",
    "GroundingTrainingArguments",
    "ImageIndex",
    "InterleavedOutput",
    "RetrievedImage",
    "ground",
    "transfer",
]


def __getattr__(name: str) -> Any:
    """Import a public name where it is first used, so that what a program does not use costs it nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
