"""Training an adapter: examples, prefixes, losses and the trainer, in reading order."""

from visual_ground.training.examples import ExampleCollator, ExampleDataset
from visual_ground.training.losses import GroundingLoss, GroundingObjective
from visual_ground.training.trainer import GroundingTrainer, GroundingTrainingArguments

__all__ = [
    "ExampleCollator",
    "ExampleDataset",
    "GroundingLoss",
    "GroundingObjective",
    "GroundingTrainer",
    "GroundingTrainingArguments",
]
