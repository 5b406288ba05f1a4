"""What a run does before its first step: how data is read, start values, and what a restart has to bring back."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from visual_ground.adapter.adapter import Adapter
from visual_ground.adapter.initialization import standardize_features
from visual_ground.errors import GroundingValueError
from visual_ground.model import GroundedModel
from visual_ground.training.arguments import GroundingTrainingArguments
from visual_ground.training.data.columns import Columns
from visual_ground.training.data.examples import ExampleDataset
from visual_ground.training.data.preparing import Preparing
from visual_ground.training.data.sampler import EpochSampler
from visual_ground.training.data.streams import ExampleStream
from visual_ground.training.losses.cached_retrieval import PrefixCache
from visual_ground.training.losses.compute_plan import choose_compute_plan, choose_prefix_cache
from visual_ground.training.losses.objective import GroundingObjective
from visual_ground.training.losses.prefix_files import PrefixFiles
from visual_ground.training.validation import image_features
from visual_ground.vision.feature_cache import FeatureCache

STATISTICS_OF = 65_536
WITHOUT_CACHE = 1024
FOLDER = "features"
# The arguments that an adapter's card shows.
RECORDED = (
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "caption_loss_scale",
    "retrieval_loss_scale",
    "concat_captions_prob",
    "captioning_fraction",
    "max_caption_length",
    "seed",
)


def preparing_of(model: GroundedModel, args: GroundingTrainingArguments) -> Preparing:
    """Return how a run's examples are prepared; the vision encoder is moved to the run's device for it."""
    if args.device.type != "cpu":
        model.vision.to(args.device)
    cache = args.feature_cache or os.path.join(args.output_dir or ".", FOLDER)
    return Preparing(
        Columns(args.image_column, args.caption_column, args.image_folder),
        FeatureCache(cache, model.vision) if args.cache_features else None,
        model.vision.feature_dim,
        args.max_skipped,
        args.per_device_eval_batch_size,
        args.dataloader_num_workers,
        not args.disable_tqdm,
        args.sampling_seed,
    )


def check_batches(examples: ExampleDataset | ExampleStream | None, args: GroundingTrainingArguments) -> None:
    """Raise where there is no batch to train on; give a cached stream's epochs as steps.

    Raises:
        GroundingValueError: a batch of one, fewer rows than a batch, a stream of unknown length without max_steps, or
            a bank of a stream's images.
    """
    size, processes = args.train_batch_size, args.world_size
    if args.bank_size and isinstance(examples, ExampleStream):
        raise GroundingValueError(
            f"bank_size={args.bank_size} draws from all images of the dataset, and a stream never has all of them at "
            "hand. Give the dataset by number, not streaming, or leave bank_size at 0."
        )
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
            raise GroundingValueError("Nobody knows how long a stream is that is not cached; give max_steps (--steps).")
        count = min(gather_object([len(examples.features.places)]))
        args.max_steps = max(1, math.ceil(args.num_train_epochs * (count // size) / args.gradient_accumulation_steps))


def first_examples(examples: ExampleDataset | ExampleStream, count: int) -> list[dict[str, Any]]:
    """Return the first examples, fewer where there are fewer."""
    if isinstance(examples, ExampleStream):
        return examples.some(count)
    return [examples[i] for i in range(min(len(examples), count))]


@torch.no_grad()
def standardise(model: GroundedModel, examples: ExampleDataset | ExampleStream) -> bool:
    """Give a new adapter the spread of the training images' features: of up to 65,536, or of 1,024 without a cache.

    Args:
        model: the grounded model.
        examples: the training examples.

    Returns:
        Whether the adapter was new.
    """
    adapter = model.adapter
    fresh = not adapter.feature_mean.any() and bool((adapter.feature_std == 1).all())
    # An image side that was brought from elsewhere is frozen, and stays as it is (`transfer`).
    if model.config.scaling != "embedding" or not fresh or not adapter.image_retrieval_projection.weight.requires_grad:
        return False
    spread = getattr(examples.features, "spread", None)
    if spread is None:
        features = image_features(model, first_examples(examples, WITHOUT_CACHE))
    else:
        features = spread(STATISTICS_OF)
    standardize_features(adapter, features.to(adapter.feature_mean.device))
    return True


def set_compute_plan(
    objective: GroundingObjective, batch: Mapping[str, Any], args: GroundingTrainingArguments, sharded: bool
) -> None:
    """Set how an objective computes its losses: what this LM can do, and what the run's settings ask for.

    Where an LM adapter learns too, what stands before `[RET]` or an image depends on it, and no way is shorter.

    Args:
        objective: the losses.
        batch: a few rows, on the run's device.
        args: the settings.
        sharded: whether the base is sharded, so that gradients are left to the backward pass.
    """
    if objective.model.config.train_lm_adapter:
        return
    model, room, folder = objective.model, int(args.prefix_cache_gb * 2**30), args.prefix_cache
    ways = choose_compute_plan(model, batch["captioning"], args.mini_batch_size or None, at_once=not sharded)
    keeper = PrefixFiles(folder, model, int(args.prefix_disk_gb * 2**30)) if folder else None
    objective.plan = ways
    objective.prefixes = choose_prefix_cache(model, batch["retrieval"], room, ways.packed, keeper)


def record_settings(model: GroundedModel, args: GroundingTrainingArguments, examples: Any) -> None:
    """Have the adapter's card say what it is trained with here.

    Args:
        model: the grounded model.
        args: the settings.
        examples: the training examples, which may be a stream without a length.
    """
    pairs = {"pairs": len(examples)} if hasattr(examples, "__len__") else {}
    settings = {name: getattr(args, name) for name in RECORDED}
    model.active.record_training({**pairs, "library_version": version("visual-ground"), **settings})


@torch.no_grad()
def refill(
    store: PrefixCache,
    loader: DataLoader,
    order: EpochSampler,
    batches: int,
    prepare: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> None:
    """Compute the prefixes that a killed run had kept, in the same batches, for float sums depend on these.

    Args:
        store: where they are kept.
        loader: the batches of an epoch.
        order: the loader's sampler.
        batches: how many the killed run had seen.
        prepare: moves a batch to the device.
    """
    epoch = 0
    while batches > 0:
        held = store.held_bytes
        order.set_epoch(epoch)
        for _, batch in zip(range(batches), loader, strict=False):
            store.run(prepare(batch)["retrieval"])
            batches -= 1
        epoch += 1
        if store.held_bytes == held:
            return


def set_row_rate(optimizer: Optimizer, adapter: Adapter, rate: float | None) -> None:
    """Give the layer from images to input rows a learning rate of its own, where it has one."""
    if rate is None:
        return
    groups = adapter.projector_groups(rate)
    own = {id(parameter) for group in groups for parameter in group["params"]}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
    for group in groups:
        optimizer.add_param_group(group)


@contextmanager
def keeping_nothing(objective: GroundingObjective) -> Iterator[None]:
    """Inside the block, prefixes are run and not kept: a restart does not evaluate again what was evaluated before."""
    kept = objective.prefixes
    objective.prefixes = None if kept is None else PrefixCache(objective.model, packed=kept.packed, leads=kept.leads)
    try:
        yield
    finally:
        objective.prefixes = kept
