"""Runs a training that kills itself with SIGKILL at a named point, then the same training again until it ends.

    python -m tests.training.killed FOLDER [POINT ...]

Prints JSON: for every point how the first run ended, and the SHA-256 of the adapter in the end; "none" is not killed.
Each run is a fork of a process that has imported everything and computed nothing.
"""

import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import traceback
from pathlib import Path

import torch
from transformers import TrainerCallback

from tests.tiny import grounded, picture
from visual_ground import GroundingTrainer, GroundingTrainingArguments
from visual_ground.storage import append_only
from visual_ground.storage import tensors as saving
from visual_ground.training import validation
from visual_ground.training.saving import checkpoints

ROWS, STEPS = 12, 8


def train(folder, trainer_class=GroundingTrainer, steps=STEPS, rows=ROWS, **changes):
    """Train a tiny model with everything that has a state: several captions and images, accumulation, workers."""
    data = []
    for i in range(rows):
        images = [folder / f"{i}-{j}.png" for j in range(2)]
        for j, path in enumerate(images):
            if not path.exists():
                picture(2 * i + j).save(path.with_suffix(".tmp"), "PNG")
                path.with_suffix(".tmp").replace(path)
        captions = [f"w{10 + i} w{20 + 2 * i} w9", f"w9 w{30 + i}", f"w{11 + i} w{12 + i}"]
        data.append({"image": [str(path) for path in images], "caption": captions})
    torch.manual_seed(0)
    model = grounded("qwen2_tied")
    settings = dict(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=steps,
        learning_rate=1e-2,
        save_steps=2,
        save_total_limit=1,
        eval_strategy="steps",
        eval_steps=3,
        logging_steps=1,
        prefix_cache_gb=0.01,
        dataloader_num_workers=1,
        num_logged_examples=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=5,
    )
    trainer = trainer_class(model, GroundingTrainingArguments(**{**settings, **changes}), data, data[:6])
    trainer.train(resume_from_checkpoint=True)
    model.save_pretrained(folder / "adapter")
    return trainer


def die(*_, **__):
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def dying(name, at=1, module=None, first=None):
    """Return a sabotage: the `at`-th call of a function kills the process, after `first` was called as it is."""

    def sabotage():
        owner = module()
        original, calls = getattr(owner, name), []

        def call(*args, **options):
            calls.append(1)
            if len(calls) == at:
                if first is not None:
                    first(original, *args, **options)
                die()
            return original(*args, **options)

        setattr(owner, name, call)

    return sabotage


def half_append(original, file, end, data, durable):
    original(file, end, data[: len(data) // 2], durable)


def half_saved(original, values, path, *args, **options):
    original(values, path, *args, **options)
    os.truncate(path, os.path.getsize(path) // 2)


def one_removed(original, folder, *args, **options):
    next(path for path in Path(folder).iterdir() if path.is_file()).unlink()


def on_event(event, step, act=die):
    """Return a sabotage: the process dies when `Trainer` reports this event after so many steps."""

    def sabotage():
        def call(self, args, state, control, **options):
            if state.global_step == step:
                act()

        callback = type("Dying", (TrainerCallback,), {event: call})
        original = GroundingTrainer.__init__

        def init(self, *args, **options):
            original(self, *args, **options)
            self.add_callback(callback())

        GroundingTrainer.__init__ = init

    return sabotage


def full_disk():
    """Let no file grow past 10 kB from the third step on, which a write meets as it meets a full disk."""

    def fill(*_):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))

    on_event("on_step_end", 3, fill)()


POINTS = {
    "none": lambda: None,
    "caching, half of a batch's rows written": dying("_append", 3, lambda: append_only, half_append),
    "caching, half of the index's line written": dying("_append", 4, lambda: append_only, half_append),
    "before the first checkpoint": on_event("on_step_end", 1),
    "between two batches of one step": on_event("on_substep_end", 4),
    "after the optimizer, before [RET] is scaled": on_event("on_optimizer_step", 4),
    "saving, adapter staged": dying("rename", 2, lambda: saving.os),
    "saving, optimizer not begun": dying("_save_optimizer_and_scheduler", 2, lambda: GroundingTrainer),
    "saving, optimizer half-written": dying("save", 5, lambda: torch, half_saved),
    "saving, not sealed": dying("seal", 2, lambda: checkpoints),
    "saving, seal not moved to its place": dying("write_json", 3, lambda: checkpoints),
    "removing the old checkpoint": dying("rmtree", 3, lambda: shutil, one_removed),
    "evaluating": dying("loss", 2, lambda: validation.Validation),
    "disk full": full_disk,
    "saving the adapter in the end": dying("rename", STEPS // 2 + 1, lambda: saving.os),
}


def fork(folder, sabotage):
    """Run the training in a forked process; return how it ended, 0 or minus a signal's number."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os.dup2(2, 1)
        try:
            sabotage()
            train(folder)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder, points):
    """Run each point in a folder of its own."""
    found = {}
    for number, point in enumerate(points):
        own = folder / str(number)
        own.mkdir(parents=True)
        ended = [fork(own, POINTS[point])]
        if ended[0] != 0:
            ended.append(fork(own, POINTS["none"]))
        weights = own / "adapter" / "adapter_model.safetensors"
        digest = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None
        found[point] = {"ended": ended, "adapter": digest}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(POINTS))
