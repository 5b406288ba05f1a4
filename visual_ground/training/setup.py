"""What a run does before its first step: the objective, the data, and the adapter's start values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from visual_ground.adapter.adapter import Adapter
from visual_ground.config import GroundingConfig
from visual_ground.errors import GroundingTypeError, GroundingValueError
from visual_ground.model import GroundedModel
from visual_ground.processes import Processes
from visual_ground.training.arguments import GroundingTrainingArguments
from visual_ground.training.data.columns import Columns, forbidden_words, is_stream
from visual_ground.training.data.examples import ExampleCollator, ExampleDataset
from visual_ground.training.data.preparing import Preparing
from visual_ground.training.data.sampler import EpochSampler
from visual_ground.training.data.streams import ExampleStream, prepare_stream
from visual_ground.training.distributed import broadcast_adapter, gathered_outside_layers
from visual_ground.training.fast_paths import set_compute_plan
from visual_ground.training.initialization.data_dependent import initialize_from_data
from visual_ground.training.initialization.statistics import first_examples, standardise
from visual_ground.training.losses.objective import FromageLoss, GroundingObjective, Loss
from visual_ground.training.selection.best_state import BestState
from visual_ground.training.selection.held_out import HeldOut, split_off
from visual_ground.vision.features.cache import FeatureCache

ANSWERS_FOLDER = "answers"
# Examples on which the fast paths are compared with the plain computation: enough for captions of several lengths.
PLAN_EXAMPLES = 8


def build_objective(model: GroundedModel, args: GroundingTrainingArguments, loss: Loss | None) -> GroundingObjective:
    """Return the module that a run trains.

    Raises:
        GroundingTypeError: `loss` cannot be called.
        GroundingValueError: a loss with trainable parameters of its own, which no checkpoint would hold.
    """
    if loss is None:
        loss = FromageLoss(args.caption_loss_scale, args.retrieval_loss_scale)
    if not callable(loss):
        raise GroundingTypeError(
            f"loss= is called with the objective and a batch, and returns a GroundingLoss, got {type(loss).__name__}; "
            "see visual_ground.training.losses.objective.Loss."
        )
    parameters = loss.named_parameters() if isinstance(loss, nn.Module) else ()
    adapter = {id(parameter) for parameter in model.parameters()}
    own = [name for name, parameter in parameters if parameter.requires_grad and id(parameter) not in adapter]
    if own:
        raise GroundingValueError(
            f"The loss has trainable parameters, {own}, and checkpoints hold only the adapter's. Freeze them."
        )
    return GroundingObjective(model, loss)


def build_collator(model: GroundedModel, args: GroundingTrainingArguments) -> ExampleCollator:
    """Return what makes batches of examples."""
    return ExampleCollator(
        model,
        args.max_caption_length,
        args.concat_captions_prob,
        args.captioning_fraction,
        args.end_captions,
        args.sampling_seed,
    )


def data_preparation(model: GroundedModel, args: GroundingTrainingArguments) -> Preparing:
    """Return how a run's examples are prepared; the vision encoder is moved to the run's device for it."""
    if args.device.type != "cpu":
        model.vision.to(args.device)
    cache = args.features_folder
    return Preparing(
        Columns(args.image_column, args.caption_column, args.image_folder, forbidden_words(model)),
        FeatureCache(cache, model.vision) if args.cache_features else None,
        model.vision.feature_dim,
        args.max_skipped,
        args.per_device_eval_batch_size,
        args.dataloader_num_workers,
        args.shows_progress,
        args.sampling_seed,
    )


def training_examples(rows: Any, preparation: Preparing) -> ExampleDataset | ExampleStream:
    """Return the examples of a dataset or a stream."""
    return prepare_stream(rows, preparation) if is_stream(rows) else preparation.examples(rows, sample=True)


def evaluation_examples(rows: Any, preparation: Preparing) -> ExampleDataset | dict[str, ExampleDataset]:
    """Return the examples of a dataset, or of several by name, each with its first image and caption."""
    if isinstance(rows, dict):
        return {str(name): preparation.examples(of_name, sample=False) for name, of_name in rows.items()}
    if is_stream(rows):
        raise GroundingTypeError("A stream has no end to evaluate at; give eval_dataset=list(stream.take(500)).")
    return preparation.examples(rows, sample=False)


def build_sampler(
    examples: ExampleDataset | ExampleStream | None, args: GroundingTrainingArguments
) -> EpochSampler | None:
    """Return the order of a dataset's examples; a stream comes in its own."""
    if not isinstance(examples, ExampleDataset):
        return None
    return EpochSampler(len(examples), args.sampling_seed, args.train_sampling_strategy != "sequential")


def check_batches(examples: ExampleDataset | ExampleStream | None, args: GroundingTrainingArguments) -> None:
    """Raise where no batch can be trained on; set `max_steps` to the epochs of a cached stream, whose length is known.

    Raises:
        GroundingValueError: a batch of one, fewer examples than a batch, or a stream of unknown length without
            max_steps.
    """
    size, processes = args.train_batch_size, args.world_size
    if args.retrieval_loss_scale and size * processes < 2:
        raise GroundingValueError(
            "A batch of one has no wrong pair to tell the right one from, and the contrastive loss needs one. Use "
            "per_device_train_batch_size of at least 2 (--batch-size), or retrieval_loss_scale=0."
        )
    if isinstance(examples, ExampleDataset):
        if args.dataloader_drop_last and len(examples) < size * processes:
            raise GroundingValueError(
                f"The dataset has {len(examples)} usable rows, and a batch takes {size * processes}. Use a smaller "
                "per_device_train_batch_size (--batch-size), or more rows."
            )
    elif examples is not None and args.max_steps <= 0:
        if examples.features is None:
            raise GroundingValueError(
                "The length of a stream is known only after its features are cached, got cache_features=False and no "
                "number of steps. Give max_steps (--steps)."
            )
        count = min(Processes.launched().gather(len(examples.features.places)))
        args.max_steps = max(1, math.ceil(args.num_train_epochs * (count // size) / args.gradient_accumulation_steps))


def initialize(
    objective: GroundingObjective,
    examples: ExampleDataset | ExampleStream,
    args: GroundingTrainingArguments,
    collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]],
    sharded: bool,
) -> None:
    """Set a new adapter's start values, and how the losses are computed."""
    is_new = standardise(objective.model, examples)
    if objective.prefixes is None:
        set_compute_plan(objective, collate(first_examples(examples, PLAN_EXAMPLES)), args, sharded)
    if is_new and args.data_dependent_init:
        # A resumed run does it too, though its checkpoint has other values: the prefix cache is then as it was.
        initialize_from_data(
            objective, examples, collate, Path(args.features_folder, ANSWERS_FOLDER), args.shows_progress
        )
    broadcast_adapter(objective.model.adapter, args.world_size)


def set_learning_rates(optimizer: Optimizer, adapter: Adapter, args: GroundingTrainingArguments) -> None:
    """Give the layer from image features to image tokens, and those into the retrieval space, their own rates."""
    groups = []
    if args.projector_learning_rate is not None:
        groups += adapter.projector_groups(args.projector_learning_rate)
    if args.retrieval_learning_rate is not None and has_start_values(adapter.config, args):
        layers = adapter.image_retrieval_projection, adapter.text_retrieval_projection
        parameters = [parameter for layer in layers for parameter in layer.parameters() if parameter.requires_grad]
        # No parameters, no group: a transferred adapter's image side is frozen.
        groups.append({"params": parameters, "lr": args.retrieval_learning_rate})
    moved = {id(parameter) for group in groups for parameter in group["params"]}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in moved]
    for group in groups:
        optimizer.add_param_group(group)


def has_start_values(config: GroundingConfig, args: GroundingTrainingArguments) -> bool:
    """Return whether a new adapter starts from what was fitted to the data, which training is not to make worse."""
    return config.scaling == "embedding" and args.data_dependent_init


def training_data(
    model: GroundedModel, rows: Any, preparation: Preparing, args: GroundingTrainingArguments
) -> tuple[ExampleDataset | ExampleStream | None, ExampleDataset | None]:
    """Return the examples to train on, and those that choose the best state; None where there are none."""
    examples = None if rows is None else training_examples(rows, preparation)
    is_chosen = args.load_best_model_at_end or not has_start_values(model.config, args)
    if is_chosen or not isinstance(examples, ExampleDataset):
        return examples, None
    return split_off(examples, args.held_out, args.sampling_seed)


def best_state(
    objective: GroundingObjective,
    held_out: ExampleDataset | None,
    args: GroundingTrainingArguments,
    log: Callable[[dict[str, float]], None],
) -> BestState:
    """Return what scores a run's states and keeps the best."""
    model, scores = objective.model, None
    if held_out is not None:
        scales = {"retrieval": args.retrieval_loss_scale, "captioning": args.caption_loss_scale}
        names = [name for name, scale in scales.items() if scale]
        options: dict[str, Any] = {"max_caption_length": args.max_caption_length, "end_captions": args.end_captions}
        collator = ExampleCollator(model, concat_captions_prob=0.0, **options)
        scores = HeldOut(objective, held_out, collator, args.per_device_eval_batch_size, names)
    return BestState(model, scores, args.patience, log, gathered_outside_layers)
