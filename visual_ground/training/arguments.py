"""`GroundingTrainingArguments`: what a training run needs and no adapter is saved with."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from visual_ground.errors import GroundingValueError


@dataclass
class GroundingTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments` with the published optimizer settings, and what grounding needs besides.

    Args:
        caption_loss_scale: weight of the captioning loss.
        retrieval_loss_scale: weight of the text-retrieval and contrastive losses.
        concat_captions_prob: how often two captions are read as one sequence when captioning.
        captioning_fraction: the part of each batch that is captioned.
        end_captions: whether a caption's end is to be predicted when captioning.
        max_caption_length: ids of a caption with its `[RET]`; longer ones are cut.
        feature_cache: folder of the frozen features; "features" in the output folder where None.
        cache_features: False runs the vision encoder in every step.
        prefix_cache_gb: memory for what the LM computes before each caption's `[RET]`, kept across epochs.
        prefix_cache: folder where it is kept on disk, for all epochs, runs and processes; None keeps none there.
        prefix_disk_gb: how much of it each process writes there at most.
        mini_batch_size: examples whose activations are in memory at once; the loss stays that of the whole batch. 0
            holds all.
        image_column: the column with the images.
        caption_column: the column with the captions.
        image_folder: where relative paths in the image column start.
        max_skipped: the part of the images and captions that may be unreadable or empty; they are reported and left
            out, and more of them stop the run.
        data_dependent_init: fit the start values of a new adapter to the training pairs, see `fitted_start`; not with
            `scaling="none"`.
        projector_learning_rate: of the layer from images to input rows; `learning_rate` where None.
        num_logged_examples: pairs drawn as a contact sheet at every evaluation; 0 draws none.
    """

    output_dir: str | None = field(default="grounded")
    learning_rate: float = field(default=1e-3)
    adam_beta2: float = field(default=0.95)
    weight_decay: float = field(default=0.0)
    max_grad_norm: float = field(default=1.0)
    per_device_train_batch_size: int = field(default=64)
    per_device_eval_batch_size: int = field(default=64)
    ddp_find_unused_parameters: bool | None = field(default=False)
    remove_unused_columns: bool = field(default=False)
    dataloader_drop_last: bool = field(default=True)
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)
    report_to: str | list[str] | None = field(
        default_factory=lambda: "tensorboard" if importlib.util.find_spec("tensorboard") else "none"
    )
    caption_loss_scale: float = field(default=1.0)
    retrieval_loss_scale: float = field(default=1.0)
    concat_captions_prob: float = field(default=0.5)
    captioning_fraction: float = field(default=1.0)
    end_captions: bool = field(default=True)
    max_caption_length: int = field(default=24)
    feature_cache: str | None = field(default=None)
    cache_features: bool = field(default=True)
    prefix_cache_gb: float = field(default=0.0)
    prefix_cache: str | None = field(default=None)
    prefix_disk_gb: float = field(default=50.0)
    mini_batch_size: int = field(default=0)
    image_column: str = field(default="image")
    caption_column: str = field(default="caption")
    image_folder: str | None = field(default=None)
    max_skipped: float = field(default=0.01)
    data_dependent_init: bool = field(default=True)
    projector_learning_rate: float | None = field(default=None)
    num_logged_examples: int = field(default=4)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.concat_captions_prob <= 1 or not 0 < self.captioning_fraction <= 1:
            raise GroundingValueError("concat_captions_prob must be in [0, 1] and captioning_fraction in (0, 1].")
        if self.max_caption_length < 2:
            raise GroundingValueError(f"max_caption_length must be at least 2, got {self.max_caption_length}.")
        for name in ("prefix_cache_gb", "prefix_disk_gb", "mini_batch_size"):
            if getattr(self, name) < 0:
                raise GroundingValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if not 0 <= self.max_skipped <= 1 or self.num_logged_examples < 0:
            raise GroundingValueError("max_skipped must be in [0, 1], and num_logged_examples must not be negative.")

    @property
    def sampling_seed(self) -> int:
        """The seed of the data's order, and of which caption and image of several is taken."""
        return self.seed if self.data_seed is None else self.data_seed
