"""Several processes: the frozen LM may be sharded, and every process has a full copy of the adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from visual_ground.adapter.adapter import Adapter
from visual_ground.errors import GroundingValueError
from visual_ground.lm.base.peft import base_model_of
from visual_ground.training.arguments import GroundingTrainingArguments
from visual_ground.training.data.streams import ExampleStream
from visual_ground.training.losses.objective import GroundingObjective


def shard_base_only(accelerator: Accelerator, objective: GroundingObjective) -> None:
    """Tell FSDP to shard the frozen LM layer by layer, and to leave the adapter alone; do nothing without FSDP.

    Raises:
        GroundingValueError: FSDP version 1, which cannot exclude a part from sharding and still average its gradients.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        raise GroundingValueError(
            f"FSDP version {plugin.fsdp_version} cannot shard the LM and replicate the adapter, which takes version 2. "
            "Launch with --fsdp_version 2."
        )
    # Every process has loaded its own copy by now, and this option would move it to "meta", where the adapter is lost.
    plugin.cpu_ram_efficient_loading = False
    plugin.ignored_modules = [objective.model.adapter]
    # accelerate reads the names of the classes to wrap from this attribute of the module that it wraps.
    layers: Any = getattr(base_model_of(objective.model.lm), "_no_split_modules", None)
    objective._no_split_modules = layers
    average_gradients(objective.model.adapter, accelerator)


def average_gradients(adapter: Adapter, accelerator: Accelerator) -> None:
    """Average the adapter's gradients over the processes, as DDP does for the modules that it wraps."""

    def average(parameter: Tensor) -> None:
        if accelerator.sync_gradients and parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= accelerator.num_processes

    for parameter in adapter.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(average)


def broadcast_adapter(adapter: Adapter, processes: int) -> None:
    """Give all processes the first one's adapter; FSDP, which does not wrap the adapter, would not."""
    if processes > 1:
        with torch.no_grad():
            for tensor in adapter.state_dict().values():
                tensor.copy_(broadcast(tensor.clone()))


@contextmanager
def gathered_outside_layers(model: nn.Module) -> Iterator[None]:
    """Inside the block, what FSDP sharded outside the LM's layers is gathered: the LM runs without its wrapper."""
    unshard: Any = getattr(model, "unshard", None)
    if unshard is None:
        yield
        return
    unshard()
    try:
        yield
    finally:
        reshard: Any = model.reshard
        reshard()


def stream_loader(
    stream: ExampleStream, collator: Callable[[list[Any]], Any], batch_size: int, args: GroundingTrainingArguments
) -> DataLoader[Any]:
    """Return the batches of this process's part of a stream, on its device."""
    loader: DataLoader[Any] = DataLoader(
        stream,
        batch_size=batch_size,
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        drop_last=True,
    )
    # As the only process (1 of them, number 0), this one is not given a part of its part again.
    prepared = prepare_data_loader(loader, args.device, 1, 0, put_on_device=True, dispatch_batches=False)
    return cast("DataLoader[Any]", prepared)


@contextmanager
def optimizer_unsharded(trainer: Trainer) -> Iterator[None]:
    """Inside the block, the trainer saves and loads its optimizer as it does without FSDP.

    FSDP shards the frozen LM, of which the optimizer has no state; the adapter, of which it has, is in every process.
    """
    enabled, trainer.is_fsdp_enabled = trainer.is_fsdp_enabled, False
    try:
        yield
    finally:
        trainer.is_fsdp_enabled = enabled
