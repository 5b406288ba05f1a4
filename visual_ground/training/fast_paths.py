"""How a run uses the losses' fast paths: which of them the LM supports, and what the prefix cache holds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader

from visual_ground.training.arguments import GroundingTrainingArguments
from visual_ground.training.data.sampler import EpochSampler
from visual_ground.training.losses.cached_retrieval import PrefixCache
from visual_ground.training.losses.compute_plan import choose_compute_plan, choose_prefix_cache
from visual_ground.training.losses.objective import GroundingObjective
from visual_ground.training.losses.prefix_files import PrefixFiles
from visual_ground.training.losses.prompts import without_images

logger = logging.getLogger(__name__)


def set_compute_plan(
    objective: GroundingObjective, batch: Mapping[str, Any], args: GroundingTrainingArguments, sharded: bool
) -> None:
    """Set how an objective computes its losses: the fast paths that this LM supports, and what the settings ask for.

    If an LM adapter is trained too, keys and values of a prefix change with it, and no fast path applies.

    Args:
        objective: the losses.
        batch: a few examples without prompts, as from `ExampleCollator`, on the run's device.
        args: the settings.
        sharded: whether FSDP shards the LM, whose gradients are then left to the backward pass.
    """
    if objective.model.config.train_lm_adapter:
        return
    model, folder = objective.model, args.prefix_cache
    mini_batch_size = args.mini_batch_size or None
    plan = choose_compute_plan(model, batch["captioning"], mini_batch_size, gradients_in_forward=not sharded)
    storage = PrefixFiles(folder, model, int(args.prefix_disk_gb * 2**30)) if folder else None
    memory_bytes = int(args.prefix_cache_gb * 2**30)
    objective.plan = plan
    objective.prefixes = choose_prefix_cache(model, batch["retrieval"], memory_bytes, plan.packed, storage)


@torch.no_grad()
def refill_prefix_cache(
    cache: PrefixCache | None,
    loader_of: Callable[[], DataLoader[Any]],
    sampler: EpochSampler | None,
    batches: int,
    on_device: Callable[[dict[str, Any]], Mapping[str, Any]],
) -> None:
    """Compute again what the prefix cache of a killed run held in memory, so that the run continues bit for bit.

    The batches must be the same, since sums of floats depend on what else is in a batch.

    Args:
        cache: the empty cache; None if the LM has no such fast path.
        loader_of: returns the batches of an epoch.
        sampler: the loader's; a stream has none, and its cache starts empty.
        batches: how many the killed run had trained on.
        on_device: moves a batch to the run's device.
    """
    if cache is None or cache.limit_bytes == 0 or sampler is None or batches == 0:
        return
    epoch, loader = 0, loader_of()
    while batches > 0:
        held_before = cache.held_bytes
        sampler.set_epoch(epoch)
        logger.info("Computing again what the prefix cache held: %d batches left.", batches)
        for _, batch in zip(range(batches), loader, strict=False):
            if texts := without_images(cache.model, on_device(batch)["retrieval"]):
                cache.run(texts)
            batches -= 1
        epoch += 1
        if cache.held_bytes == held_before:  # The memory is full, or has all captions.
            return


@contextmanager
def prefixes_not_kept(objective: GroundingObjective) -> Iterator[None]:
    """Inside the block, prefixes are computed and not kept.

    A restart does not repeat the evaluations before it, so these must not decide what the prefix cache holds.
    """
    cache = objective.prefixes
    objective.prefixes = None if cache is None else cache.without_memory()
    try:
        yield
    finally:
        objective.prefixes = cache
