"""Many devices: the frozen base may be sharded, the adapter never is; every process has it whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from visual_ground.adapter.adapter import Adapter
from visual_ground.errors import GroundingValueError
from visual_ground.lm.peft import base_model_of
from visual_ground.training.losses.objective import GroundingObjective


def shard_base_only(accelerator: Accelerator, objective: GroundingObjective) -> None:
    """Tell FSDP to shard the frozen parts by the LM's own layers, and to leave the adapter alone.

    Args:
        accelerator: nothing is done where it has no FSDP plugin.
        objective: what FSDP will wrap.

    Raises:
        GroundingValueError: FSDP version 1, which cannot leave a part alone and average its gradients.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        raise GroundingValueError(
            "Only FSDP version 2 can shard the base and replicate the adapter. Launch with --fsdp_version 2."
        )
    # Every process has loaded its own copy by now, and moving modules to "meta" would lose the adapter.
    plugin.cpu_ram_efficient_loading = False
    plugin.ignored_modules = [objective.model.adapter]
    layers: Any = getattr(base_model_of(objective.model.lm), "_no_split_modules", None)
    objective._no_split_modules = layers
    average_gradients(objective.model.adapter, accelerator)


def average_gradients(adapter: Adapter, accelerator: Accelerator) -> None:
    """Average the adapter's gradients over the processes, as DDP does for what it wraps."""

    def average(parameter: Tensor) -> None:
        if accelerator.sync_gradients and parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= accelerator.num_processes

    for parameter in adapter.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(average)


def share_adapter(adapter: Adapter, processes: int) -> None:
    """Give all processes the first one's adapter; distributed wrappers do so only for what they wrap."""
    if processes > 1:
        with torch.no_grad():
            for tensor in adapter.state_dict().values():
                tensor.copy_(broadcast(tensor.clone()))


@contextmanager
def gathered_outside_layers(model: nn.Module) -> Iterator[None]:
    """Inside the block, what FSDP sharded outside the LM's layers is whole, so that the LM runs without its wrapper."""
    shards = callable(getattr(model, "unshard", None))
    if shards:
        model.unshard()
    try:
        yield
    finally:
        if shards:
            model.reshard()
