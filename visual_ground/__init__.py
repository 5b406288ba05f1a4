"""Give any language model eyes, and let it answer with pictures, without touching its weights."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visual_ground.config import GroundingConfig
    from visual_ground.errors import GroundingError
    from visual_ground.evaluation.tasks.evaluate import evaluate
    from visual_ground.fitting.fit import fit
    from visual_ground.generation.output import InterleavedOutput, RetrievedImage
    from visual_ground.grounding import ground, unground
    from visual_ground.index.image_index import ImageIndex
    from visual_ground.model import GroundedModel
    from visual_ground.prompts.types import Prompt
    from visual_ground.training.arguments import GroundingTrainingArguments
    from visual_ground.training.trainer import GroundingTrainer
    from visual_ground.transferring.transfer import transfer
    from visual_ground.vision.images import ImageLike

_HOMES = {
    "GroundedModel": "model",
    "GroundingConfig": "config",
    "GroundingError": "errors",
    "GroundingTrainer": "training.trainer",
    "GroundingTrainingArguments": "training.arguments",
    "ImageIndex": "index.image_index",
    "ImageLike": "vision.images",
    "InterleavedOutput": "generation.output",
    "Prompt": "prompts.types",
    "RetrievedImage": "generation.output",
    "evaluate": "evaluation.tasks.evaluate",
    "fit": "fitting.fit",
    "ground": "grounding",
    "transfer": "transferring.transfer",
    "unground": "grounding",
}

__all__ = [
    "GroundedModel",
    "GroundingConfig",
    "GroundingError",
    "GroundingTrainer",
    "GroundingTrainingArguments",
    "ImageIndex",
    "ImageLike",
    "InterleavedOutput",
    "Prompt",
    "RetrievedImage",
    "evaluate",
    "fit",
    "ground",
    "transfer",
    "unground",
]


def __getattr__(name: str) -> Any:
    """Import a public name where it is first used, so that what a program does not use costs it nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
