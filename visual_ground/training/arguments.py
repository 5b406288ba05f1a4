"""`GroundingTrainingArguments`: what a training run needs and no adapter is saved with."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from visual_ground.errors import GroundingValueError

# Settings of transformers that would be ignored, or would change what is computed behind the losses' back: the value
# that does nothing, and why.
REFUSED: dict[str, tuple[object, str]] = {
    "neftune_noise_alpha": (0, "the LM's embeddings are frozen, and what is computed from them is kept"),
    "label_smoothing_factor": (0, "the losses are not transformers'; pass a loss= of your own to smooth labels"),
    "fp16_full_eval": (False, "load the LM in float16 instead; the adapter stays in float32"),
    "bf16_full_eval": (False, "load the LM in bfloat16 instead; the adapter stays in float32"),
    "include_num_input_tokens_seen": ("no", "tokens_per_second is logged"),
    "use_liger_kernel": (False, "the losses run the LM's head at labels only"),
    "torch_compile": (False, "the losses read the LM through hooks; compile the LM itself, with lm.compile()"),
    "debug": ([], "it stops at infinite logits, which ids that must not be said have"),
}
NOT_NEGATIVE = (
    *("caption_loss_scale", "retrieval_loss_scale", "max_grad_norm"),
    *("prefix_cache_gb", "prefix_disk_gb", "mini_batch_size", "num_logged_examples"),
)


@dataclass
class GroundingTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments` with the published optimizer settings, and what grounding needs in addition.

    Args:
        caption_loss_scale: weight of the captioning loss.
        retrieval_loss_scale: weight of the text-retrieval loss and the contrastive losses together.
        concat_captions_prob: probability, in [0, 1], that a batch's captions are joined in twos for captioning.
        captioning_fraction: the part of each batch, in (0, 1], that is captioned; all of it is retrieved.
        end_captions: whether captioning also predicts the end of a caption.
        max_caption_length: length of a caption with its `[RET]`, in tokens; longer captions are cut.
        feature_cache: folder of the cached image features; "features" in the output folder if None.
        cache_features: compute the features of all images once, before training; False runs the vision encoder in
            every step.
        prefix_cache_gb: memory, in GiB on the LM's device, for what it computes of the captions' tokens before `[RET]`,
            which is then computed once and not in every epoch: 0.25 holds some 20,000 short captions of a 135 M LM with
            a retrieval prompt, and some 1,000 without one. 0 keeps nothing.
        prefix_cache: folder that keeps them on disk, for all epochs, runs and processes; None keeps none on disk.
        prefix_disk_gb: how much each process writes there at most, in GiB.
        mini_batch_size: examples whose activations are in memory at once; the loss stays that of the whole batch. 0
            holds the whole batch's.
        image_column: the dataset's column with an image or a list of images.
        caption_column: the dataset's column with a caption or a list of captions.
        image_folder: the folder that relative paths in the image column start from.
        max_skipped: the part of the images and captions, in [0, 1], that may be unreadable or empty. They are reported
            and left out; if there are more, the run stops.
        data_dependent_init: fit the start values of a new adapter to the training pairs before the first step, see
            `training.initialization`; without effect if the adapter's `scaling` is "none".
        projector_learning_rate: learning rate of the layer from image features to image tokens; `learning_rate` if
            None.
        retrieval_learning_rate: learning rate of the two layers into the retrieval space, whose start values need only
            small changes; `learning_rate` if None, and if they have no such start values: with
            `data_dependent_init=False` or the adapter's `scaling` "none".
        held_out: the part of the training data's groups, in [0, 1), that is not trained on. The start and ten states of
            the run are scored on it, and the best is the result. Without effect for streams, with
            `load_best_model_at_end`, with start values as above, and if it would be fewer than ten groups.
        patience: scores in a row without a better one, after which the run ends.
        num_logged_examples: pairs drawn on the contact sheet of each evaluation; 0 draws none.

    Raises:
        GroundingValueError: a value outside its range.
    """

    output_dir: str | None = field(default="grounded")
    # As published: AdamW with betas 0.9 and 0.95, no weight decay, gradients clipped to norm 1. The rate is not (3e-4).
    learning_rate: float = field(default=1e-3)
    adam_beta2: float = field(default=0.95)
    weight_decay: float = field(default=0.0)
    max_grad_norm: float = field(default=1.0)
    per_device_train_batch_size: int = field(default=64)
    per_device_eval_batch_size: int = field(default=64)
    # Every trained parameter gets a gradient in every step.
    ddp_find_unused_parameters: bool | None = field(default=False)
    # Columns are read by our own dataset, not by the names of the model's arguments.
    remove_unused_columns: bool = field(default=False)
    # A smaller last batch would have fewer wrong pairs to compare with, and so a smaller contrastive loss.
    dataloader_drop_last: bool = field(default=True)
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)
    # Replaces non-finite losses in the log, at two GPU synchronisations a batch; here such a loss stops the run.
    logging_nan_inf_filter: bool = field(default=False)
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
    prefix_cache_gb: float = field(default=0.25)
    prefix_cache: str | None = field(default=None)
    prefix_disk_gb: float = field(default=50.0)
    mini_batch_size: int = field(default=0)
    image_column: str = field(default="image")
    caption_column: str = field(default="caption")
    image_folder: str | None = field(default=None)
    max_skipped: float = field(default=0.01)
    data_dependent_init: bool = field(default=True)
    projector_learning_rate: float | None = field(default=None)
    retrieval_learning_rate: float | None = field(default=3e-5)
    held_out: float = field(default=0.1)
    patience: int = field(default=3)
    num_logged_examples: int = field(default=4)

    def __post_init__(self) -> None:
        self.remove_unused_columns = False  # Nothing that is not used is read in the first place.
        self.max_grad_norm = 0.0 if self.max_grad_norm is None else self.max_grad_norm  # Neither clips.
        super().__post_init__()  # type: ignore[no-untyped-call]  # transformers' is untyped
        for name in ("concat_captions_prob", "captioning_fraction", "max_skipped"):
            if not 0 <= getattr(self, name) <= 1:
                raise GroundingValueError(f"{name} must be in [0, 1], got {getattr(self, name)}.")
        if self.captioning_fraction == 0:
            raise GroundingValueError("captioning_fraction must be in (0, 1], got 0; see caption_loss_scale=0.")
        if not 0 <= self.held_out < 1:
            raise GroundingValueError(f"held_out must be in [0, 1), got {self.held_out}.")
        if self.patience < 1:
            raise GroundingValueError(f"patience must be at least 1, got {self.patience}.")
        if self.max_caption_length < 2:
            raise GroundingValueError(
                f"max_caption_length must be at least 2, a token and [RET], got {self.max_caption_length}."
            )
        for name in NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise GroundingValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if self.gradient_accumulation_steps < 1:
            raise GroundingValueError(
                f"gradient_accumulation_steps must be at least 1, got {self.gradient_accumulation_steps}."
            )
        self._refuse_what_has_no_meaning()

    def _refuse_what_has_no_meaning(self) -> None:
        for name, number in vars(self).items():
            clips_nothing = (name, number) == ("max_grad_norm", math.inf)
            if isinstance(number, float) and not math.isfinite(number) and not clips_nothing:
                raise GroundingValueError(f"{name} must be a finite number, got {number}.")
        for name, (nothing, reason) in REFUSED.items():
            if (value := getattr(self, name)) not in (None, nothing):
                raise GroundingValueError(f"{name}={value!r} has no meaning here: {reason}. Leave it out.")
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise GroundingValueError(
                f"train_sampling_strategy={self.train_sampling_strategy!r} has no meaning here: captions of similar "
                "length are put together within each batch. Use 'random' or 'sequential'."
            )
        if getattr(self.accelerator_config, "dispatch_batches", False):
            raise GroundingValueError(
                "dispatch_batches=True would send batches as tensors from the first process, and they are lists of "
                "unpadded sequences. Leave it out: every process reads its own part."
            )

    @property
    def shows_progress(self) -> bool:
        """Whether this process shows progress bars."""
        return not self.disable_tqdm and self.local_process_index == 0

    @property
    def features_folder(self) -> str:
        """Where a run keeps what frozen models gave it: images' features, and the LM's own answers."""
        return self.feature_cache or os.path.join(self.output_dir or ".", "features")

    @property
    def sampling_seed(self) -> int:
        """The seed of the order of the examples, and of which caption and image is drawn if one has several."""
        return self.seed if self.data_seed is None else self.data_seed
