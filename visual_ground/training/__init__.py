"""Training an adapter: data, losses and their fast paths, start values, and the trainer that runs them.

`trainer` is the door; `setup` and `fast_paths` prepare a run, `validation` and `contact_sheet` look at it.
"""

from visual_ground.training.arguments import GroundingTrainingArguments
from visual_ground.training.data.examples import ExampleCollator, ExampleDataset
from visual_ground.training.losses.objective import FromageLoss, GroundingLoss, GroundingObjective, Loss, PreparedBatch
from visual_ground.training.trainer import GroundingTrainer

__all__ = [
    "ExampleCollator",
    "ExampleDataset",
    "FromageLoss",
    "GroundingLoss",
    "GroundingObjective",
    "GroundingTrainer",
    "GroundingTrainingArguments",
    "Loss",
    "PreparedBatch",
]
