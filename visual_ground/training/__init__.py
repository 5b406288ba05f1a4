"""Training an adapter: rows, examples, losses and the trainer; docs/architecture.md has the reading order."""

from visual_ground.training.arguments import GroundingTrainingArguments
from visual_ground.training.data.examples import ExampleCollator, ExampleDataset
from visual_ground.training.losses.objective import GroundingLoss, GroundingObjective
from visual_ground.training.trainer import GroundingTrainer

__all__ = [
    "ExampleCollator",
    "ExampleDataset",
    "GroundingLoss",
    "GroundingObjective",
    "GroundingTrainer",
    "GroundingTrainingArguments",
]
