"""Prefixes on disk: the same numbers, shared, and whole after a crash or on a full disk."""

import os

import torch

from tests.tiny import grounded
from tests.training.losses.test_objective import batch_of, check_same, loss_and_gradients
from visual_ground.storage import append_only
from visual_ground.training.losses.cached_retrieval import PrefixCache
from visual_ground.training.losses.prefix_files import PrefixFiles, lm_fingerprint


def runs_of(model):
    runs = []
    model.lm.register_forward_pre_hook(lambda m, a, kwargs: runs.append(kwargs["input_ids"].shape), with_kwargs=True)
    return runs


def test_what_one_process_wrote_another_reads(tmp_path):
    model = grounded("gpt2", text_layers=(-1, 1))
    batch = batch_of(model)
    plain = loss_and_gradients(model, batch)
    first = PrefixCache(model, storage=PrefixFiles(tmp_path, model, 2**20))
    check_same(plain, loss_and_gradients(model, batch, prefixes=first))
    other = PrefixCache(model, storage=PrefixFiles(tmp_path, model, 2**20))
    runs = runs_of(model)
    check_same(plain, loss_and_gradients(model, batch, prefixes=other))
    assert len([shape for shape in runs if shape[1] == 1]) == 1
    assert len(runs) == 1 + len([shape for shape in runs if shape[1] > 1])
    alone = PrefixFiles(tmp_path, model, 2**20)
    key = next(iter(other._kept), None) or next(iter(first._kept), None)
    assert key is None  # neither keeps anything in memory
    assert len(alone.store.numbers) == 0 and alone.get(((1,), 0)) is None and len(alone.store.numbers) == 8


def test_a_torn_record_does_not_count_and_a_full_disk_does_not_stop(tmp_path, monkeypatch):
    model = grounded()
    batch = batch_of(model)["retrieval"]
    PrefixCache(model, storage=PrefixFiles(tmp_path, model, 2**20)).run(batch)
    (data,), (index,) = tmp_path.glob("*/prefixes.bin"), tmp_path.glob("*/*.jsonl")
    os.truncate(data, data.stat().st_size - 1)
    with open(index, "a") as file:
        file.write('{"row": 8, "keys": ["ha')
    after = PrefixFiles(tmp_path, model, 2**20)
    after.get(((1,), 0))
    assert len(after.store.numbers) == 7
    plain = PrefixCache(model).run(batch)
    assert torch.equal(PrefixCache(model, storage=after).run(batch).vectors, plain.vectors)
    full = PrefixFiles(tmp_path / "full", model, 2**20)
    monkeypatch.setattr(append_only, "_append", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    assert torch.equal(PrefixCache(model, storage=full).run(batch).vectors, plain.vectors)
    assert full.limit_bytes == 0
    small = PrefixFiles(tmp_path / "small", model, 1)
    PrefixCache(model, storage=small).run(batch)
    assert not small.store.numbers


def test_another_lm_has_another_folder():
    model = grounded()
    before = lm_fingerprint(model)
    assert before == lm_fingerprint(grounded())
    model.lm.lm_head.weight[0, 0] += 1
    assert lm_fingerprint(model) != before
