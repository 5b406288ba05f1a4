"""Whatever kills a run, and whenever: the same command goes on, and ends with the same adapter to the bit."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.paths import ROOT
from tests.tiny import build, grounded, tokenizer
from tests.training.killed import POINTS, train
from tests.training.runs import ROWS, arguments
from visual_ground import GroundedModel, GroundingTrainer
from visual_ground.errors import GroundingFileError, GroundingValueError
from visual_ground.storage.atomic import only_writer
from visual_ground.training.saving import checkpoints
from visual_ground.training.saving.adapter_checkpoints import check_base


def run(folder, *points):
    command = [sys.executable, "-m", "tests.training.killed", str(folder), *points]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.slow
def test_killed_anywhere_ends_bit_identical(tmp_path):
    found, said = run(tmp_path, *POINTS)
    whole = found.pop("none")
    assert whole["ended"] == [0]
    full = found.pop("disk full")
    assert full["ended"] == [1, 0] and "could not be written" in said and "['checkpoint-2'] are complete" in said
    assert len(found) >= 10 and all(result["ended"] == [-9, 0] for result in found.values())
    wrong = [point for point, result in {**found, "disk full": full}.items() if result["adapter"] != whole["adapter"]]
    assert not wrong


def test_what_is_half_written_does_not_count(tmp_path):
    trainer = train(tmp_path, steps=4, save_total_limit=None)
    run = tmp_path / "run"
    assert [path.name for path in checkpoints.complete_checkpoints(run)] == ["checkpoint-2", "checkpoint-4"]
    last = run / "checkpoint-4"
    for path in sorted(last.iterdir()):
        kept = path.read_bytes()
        path.write_bytes(kept[: len(kept) // 2])
        assert checkpoints.choose(True, run) == run / "checkpoint-2"
        path.unlink()
        assert checkpoints.choose(True, run) == run / "checkpoint-2"
        with pytest.raises(GroundingFileError, match="not a complete checkpoint"):
            trainer.train(resume_from_checkpoint=str(last))
        path.write_bytes(kept)
    assert checkpoints.choose(True, run) == last
    (last / "optimizer.pt").unlink()
    checkpoints.remove_surplus(run, 2, None)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2"]
    assert checkpoints.choose(True, tmp_path / "none") is None


def test_a_finished_run_is_not_trained_further(tmp_path):
    train(tmp_path, steps=2)
    first = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert train(tmp_path, steps=2).state.global_step == 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == first


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("full"), KeyboardInterrupt()])
def test_a_checkpoint_of_an_earlier_run_is_whole_until_the_new_one_is(error, tmp_path):
    settings = dict(max_steps=1, data_dependent_init=False, save_strategy="steps", save_steps=1)
    folder = tmp_path / "checkpoint-1"

    def content():
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    class Failing(GroundingTrainer):
        def _save_optimizer_and_scheduler(self, output_dir):
            raise error

    GroundingTrainer(grounded(), arguments(tmp_path, **settings), ROWS).train()
    earlier = content()
    with pytest.raises((GroundingFileError, KeyboardInterrupt)):
        Failing(grounded(), arguments(tmp_path, **settings), ROWS).train()
    assert checkpoints.is_complete(folder) and content() == earlier
    # A process that was killed in between leaves the earlier one aside.
    checkpoints.set_aside(folder)
    GroundingTrainer(grounded(), arguments(tmp_path, learning_rate=1.0, **settings), ROWS).train()
    name = "adapter_model.safetensors"
    assert checkpoints.is_complete(folder) and content()[name] != earlier[name]
    assert [path.name for path in tmp_path.iterdir() if "checkpoint" in path.name] == ["checkpoint-1"]


def test_two_runs_do_not_write_into_one_checkpoint(tmp_path):
    settings = dict(max_steps=1, data_dependent_init=False, save_strategy="steps", save_steps=1)
    GroundingTrainer(grounded(), arguments(tmp_path, **settings), ROWS).train()
    folder = tmp_path / "checkpoint-1"
    earlier = {path.name: path.read_bytes() for path in folder.iterdir()}
    second = GroundingTrainer(grounded(), arguments(tmp_path, learning_rate=1.0, **settings), ROWS)
    with only_writer(tmp_path), pytest.raises(GroundingFileError, match="being written by another process"):
        second.train()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == earlier and checkpoints.is_complete(folder)
    second.train()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} != earlier and checkpoints.is_complete(folder)


def test_a_published_adapter_is_trained_further_without_its_optimizer(tmp_path):
    train(tmp_path, steps=2)
    published = GroundedModel.from_pretrained(
        build("qwen2_tied"), tmp_path / "adapter", grounded().vision, tokenizer(), is_trainable=True
    )
    before = {name: value.detach().clone() for name, value in published.adapter.named_parameters()}

    (more := tmp_path / "more").mkdir()

    class Further(GroundingTrainer):
        def __init__(self, model, *options):
            super().__init__(published, *options)

    trainer = train(more, Further, steps=2)
    assert trainer.state.global_step == 2
    assert any(not torch.equal(before[name], value) for name, value in published.adapter.named_parameters())


def test_a_checkpoint_of_another_base_is_refused(tmp_path):
    train(tmp_path, steps=2)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    lm = build("qwen2_tied")
    lm.get_input_embeddings().weight.data.mul_(1.5)
    for model, words in [
        (grounded(lm=lm), "another base model"),
        (grounded("llama_untied"), "another base model"),
        (grounded("qwen2_tied", retrieval_dim=5), r"other settings.*retrieval_dim.*\(6, 5\)"),
    ]:
        with pytest.raises(GroundingValueError, match=words):
            check_base(checkpoint, model)
    other = grounded("qwen2_tied")
    other.active.provenance["vision_encoder"] = "another/encoder"
    with pytest.raises(GroundingValueError, match="another vision encoder"):
        check_base(checkpoint, other)
    check_base(checkpoint, grounded("qwen2_tied"))
