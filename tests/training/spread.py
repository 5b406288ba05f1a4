"""Trains a tiny model in as many processes as there are, and writes what each of them saw.

    accelerate launch --multi_gpu --num_processes 2 -m tests.training.spread FOLDER [KIND]

KIND is "table", "stream" for a stream of four files, "held_out" for a table half of which chooses the best state, or
"fsdp" for a table and a sharded base: accelerate shards on GPUs only, so its plugin is put in by hand here, and torch's
own FSDP then runs on gloo.
"""

import hashlib
import json
import sys
from pathlib import Path

import datasets
import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState
from safetensors.torch import save

from tests.tiny import grounded, picture
from visual_ground import GroundingTrainer, GroundingTrainingArguments

ROWS = 16


def data_of(kind, folder):
    """Return the rows; the first process writes their images."""
    numbers = range(2 * ROWS if kind == "held_out" else ROWS)
    names, captions = [str(folder / f"{i}.png") for i in numbers], [f"w{10 + i} w{30 + i}" for i in numbers]
    if PartialState().is_main_process:
        for i, name in enumerate(names):
            picture(i).save(name)
    PartialState().wait_for_everyone()
    rows = [{"image": name, "caption": caption} for name, caption in zip(names, captions, strict=True)]
    if kind != "stream":
        return rows
    return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=4)


class Watched(GroundingTrainer):
    """Notes the rows of every batch."""

    seen: list

    def compute_loss(self, model, inputs, *args, **options):
        """Note which captions there are."""
        if model.training:
            self.seen.append(inputs["rows"].tolist())
            self.captions += [list(sequence.ids) for sequence in inputs["retrieval"]]
        return super().compute_loss(model, inputs, *args, **options)


class Sharded(Watched):
    """The same with FSDP on CPUs."""

    def create_accelerator_and_postprocess(self):
        """Say that this is FSDP, which accelerate does for GPUs by itself."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
        state.distributed_type = DistributedType.FSDP
        self.is_fsdp_enabled = True


def main(folder, kind):
    """Train, save, and write what this process saw."""
    torch.set_num_threads(1)
    # Before anything asks how many processes there are: the arguments say that they are on CPUs.
    args = GroundingTrainingArguments(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=3,
        max_steps=4,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        learning_rate=10.0 if kind == "held_out" else 1e-2,
        held_out=0.5 if kind == "held_out" else 0.0,
        num_logged_examples=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    rank = args.process_index
    data = data_of(kind, folder)
    torch.manual_seed(rank)  # The processes start differently, and have to agree by themselves.
    model = grounded("llama_untied")
    rows = list(data)
    trainer = (Sharded if kind == "fsdp" else Watched)(model, args, data, rows[:7])
    trainer.seen, trainer.captions = [], []
    trainer.train(resume_from_checkpoint=True)
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in model.adapter.state_dict().items()}
    found = {
        "rows": trainer.seen,
        "captions": trainer.captions,
        "adapter": hashlib.sha256(save(tensors)).hexdigest(),
        "best": {name: score for part in trainer._best.parts.values() for name, score in part.found.items()},
        "scores": [entry for entry in trainer.state.log_history if "held_out_retrieval" in entry],
        "metrics": [entry for entry in trainer.state.log_history if "eval_loss" in entry],
        "writes": trainer.args.should_save,
        "base": sum(p.numel() for p in model.lm.parameters()),
        "sharded": sum(type(p).__name__ == "DTensor" for p in model.lm.parameters()),
        "replicated": [type(p.data).__name__ for p in model.adapter.parameters()],
    }
    (folder / f"{kind}-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "table")
