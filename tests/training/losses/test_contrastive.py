"""Contrastive learning over processes, and the trainer's memory settings."""

import datetime
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from tests.tiny import grounded
from tests.training.losses.test_objective import batch_of, loss_and_gradients
from tests.training.runs import ROWS, arguments
from visual_ground import GroundingTrainer
from visual_ground.errors import GroundingValueError
from visual_ground.training.losses.cached_retrieval import PrefixCache
from visual_ground.training.losses.captioning import ComputePlan
from visual_ground.training.losses.objective import GroundingObjective


def part_of(batch, rows):
    """Take rows of a batch whose images are one virtual row each, numbered anew from the first."""
    first = 101
    parts = {name: value[rows] for name, value in batch.items()}
    parts["captioning"] = [
        replace(sequence, ids=tuple(i - rows.start if i >= first else i for i in sequence.ids))
        for sequence in parts["captioning"]
    ]
    return parts


def whole_batch(model):
    batch = batch_of(model)
    batch["groups"] = torch.tensor([0, 1, 2, 0, 4, 5, 2, 7])
    return batch


def one_of_several(rank, world, folder, quick, dtype):
    limit = datetime.timedelta(minutes=5)
    dist.init_process_group("gloo", None, limit, world, rank, torch.distributed.FileStore(f"{folder}/meet", world))
    model = grounded().to(dtype)
    bounds = [0, 3, 6, 8] if world == 3 else [0, 5, 8]
    part = part_of(whole_batch(model), slice(bounds[rank], bounds[rank + 1]))
    options = dict(prefixes=PrefixCache(model), plan=ComputePlan(True, True, True, 2)) if quick else {}
    objective = DistributedDataParallel(GroundingObjective(model, **options).train())
    losses = objective(**part)
    losses.loss.backward()
    gradients = {name: value.grad for name, value in model.adapter.named_parameters()}
    every = [torch.zeros_like(losses.loss) for _ in range(world)]
    dist.all_gather(every, losses.loss.detach())
    if rank == 0:
        torch.save((torch.stack(every).mean(), gradients), f"{folder}/found")
    dist.destroy_process_group()


# The tiny LM's texts are nearly alike, so differences between them are small, and float32 knows them to fewer digits.
@pytest.mark.parametrize(
    ("world", "quick", "dtype", "tolerance"),
    [(2, True, torch.float32, 1e-5), (2, True, torch.float64, 1e-6), (3, False, torch.float64, 1e-6)],
)
def test_processes_together_are_one_with_the_whole_batch(world, quick, dtype, tolerance, tmp_path):
    model = grounded().to(dtype)
    losses, gradients = loss_and_gradients(model, whole_batch(model))
    mp.spawn(one_of_several, (world, str(tmp_path), quick, dtype), nprocs=world)
    mean, found = torch.load(tmp_path / "found")
    assert torch.allclose(mean, losses.loss, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients.items():
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm(), name


def test_the_trainer_takes_disk_and_parts(tmp_path):
    options = dict(prefix_cache=str(tmp_path / "prefixes"), mini_batch_size=2, max_steps=2)
    model = grounded()
    trainer = GroundingTrainer(model, arguments(tmp_path, **options), ROWS)
    trainer.train()
    assert len(list(tmp_path.glob("prefixes/*/prefixes.bin"))) == 1
    assert trainer.model.plan == ComputePlan(True, True, True, 2)
    with pytest.raises(GroundingValueError, match="mini_batch_size must not be negative"):
        arguments(tmp_path, mini_batch_size=-1)
