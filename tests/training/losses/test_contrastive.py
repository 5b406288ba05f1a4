"""Contrastive learning over processes and banks."""

import datetime

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from tests.tiny import grounded
from tests.training.losses.test_objective import batch_of, loss_and_gradients
from tests.training.test_trainer import ROWS, arguments
from visual_ground import GroundingTrainer
from visual_ground.errors import GroundingValueError
from visual_ground.training import ExampleDataset, GroundingObjective
from visual_ground.training.losses.cached_retrieval import PrefixCache
from visual_ground.training.losses.captioning import ComputePlan
from visual_ground.training.losses.contrastive import FeatureBank, contrast


def part_of(batch, rows):
    """Take rows of a batch whose images are one virtual row each, numbered anew from the first."""
    first = 101
    parts = {name: value[rows] for name, value in batch.items() if not isinstance(value, dict)}
    for name in ("captioning", "retrieval"):
        parts[name] = {key: tensor[rows].clone() for key, tensor in batch[name].items()}
    ids = parts["captioning"]["input_ids"]
    ids[ids >= first] -= rows.start
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


def test_a_bank_adds_negatives_of_other_groups():
    model = grounded()
    texts, features = torch.nn.functional.normalize(torch.randn(4, 6), dim=-1), torch.randn(4, 12)
    groups, adapter = torch.arange(4), model.adapter
    bank = torch.randn(9, 12)
    others = torch.tensor([0, 0, 5, 6, 7, 8, 9, 1, 2])
    found = contrast(adapter, texts, features, groups, FeatureBank(bank, others, 9))
    scale, images = adapter.logit_scale.exp(), adapter.embed_images(torch.cat([features, bank]))
    wanted = []
    for row in range(4):
        kept = [i for i in range(13) if i == row or torch.cat([groups, others])[i] != row]
        scores = scale * texts[row] @ images[kept].T
        wanted.append(scores.logsumexp(0) - scale * texts[row] @ images[row])
    assert torch.allclose(found.text_to_image, torch.stack(wanted).mean(), rtol=1e-5)
    assert torch.equal(found.image_to_text, contrast(adapter, texts, features, groups).image_to_text)
    few = contrast(adapter, texts, features, groups, FeatureBank(bank, others, 2))
    assert contrast(adapter, texts, features, groups).text_to_image <= few.text_to_image
    with pytest.raises(GroundingValueError, match="size 0"):
        FeatureBank(bank, others, 0)


def test_the_trainer_takes_bank_disk_and_parts(tmp_path):
    options = dict(bank_size=5, prefix_cache=str(tmp_path / "prefixes"), mini_batch_size=2, max_steps=2)
    model = grounded()
    trainer = GroundingTrainer(model, arguments(tmp_path, **options), ROWS)
    trainer.train()
    assert trainer.model.bank.size == 5 and len(trainer.model.bank.groups) == len(ROWS)
    assert len(list(tmp_path.glob("prefixes/*/*.prefixes"))) == 1
    assert trainer.model.plan == ComputePlan(True, True, True, 2)
    with pytest.raises(GroundingValueError, match="cache_features"):
        arguments(tmp_path, bank_size=1, cache_features=False)
    with pytest.raises(GroundingValueError, match="mini_batch_size must not be negative"):
        arguments(tmp_path, mini_batch_size=-1)
    with pytest.raises(GroundingValueError, match="image features"):
        FeatureBank.of(ExampleDataset(ROWS), 3)
