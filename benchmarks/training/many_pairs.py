"""Whether memory grows while many image-caption pairs flow through: webdataset shards, the feature cache, one epoch.

    python benchmarks/training/many_pairs.py [--pairs 10000]

The pairs are random 64 x 64 JPEGs in shards as img2dataset writes them (jpg, txt and json members), read as a stream.
The LM and the encoder are tiny, so that what is held is what the data path holds. Resident memory is noted as the pairs
pass: in the caching pass by thousands, in the epoch by steps.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from visual_ground import GroundingTrainer, GroundingTrainingArguments, ground
from visual_ground.training.data.loading import find_columns, load_rows
from visual_ground.vision.features.cache import FeatureCache

sys.path.insert(0, str(Path(__file__).parent.parent))
from measure import resident_mb, write

WORDS, PER_SHARD, BATCH = 200, 1000, 50


class Eye(torch.nn.Module):
    """Pixels (n, 3, 64, 64) to features (n, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 64, 16, 16)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Map pixels to features."""
        return self.layer(pixels).mean((2, 3))


def pixels(images: list, return_tensors: str = "pt") -> dict[str, torch.Tensor]:
    """Stand in for an image processor."""
    return {"pixel_values": torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) / 255 for i in images])}


def tiny() -> object:
    """Return a grounded tiny LM."""
    words = {"<s>": 0, **{f"w{i}": i for i in range(1, WORDS)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<s>")
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = AutoConfig.for_model("llama", vocab_size=WORDS, **sizes)
    return ground(AutoModelForCausalLM.from_config(config).eval(), Eye(), tokenizer, pixels)


def write_shards(folder: Path, count: int) -> None:
    """Write the pairs, a thousand in each shard."""
    generator = np.random.default_rng(0)
    for shard in range(0, count, PER_SHARD):
        with tarfile.open(folder / f"{shard // PER_SHARD:05d}.tar", "w") as tar:
            for i in range(shard, min(shard + PER_SHARD, count)):
                file = io.BytesIO()
                Image.fromarray(generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(file, "JPEG")
                caption = " ".join(f"w{w}" for w in generator.integers(1, WORDS, 8))
                about = json.dumps({"caption": caption, "key": f"{i:09d}"})
                for suffix, data in (("jpg", file.getvalue()), ("txt", caption.encode()), ("json", about.encode())):
                    member = tarfile.TarInfo(f"{i:09d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


class Memory(TrainerCallback):
    """Notes the resident memory as pairs are encoded, and as steps are done."""

    def __init__(self) -> None:
        self.caching: list[float] = []
        self.epoch: list[float] = []
        encode, self._seen = FeatureCache._encode, 0

        def noted(cache: FeatureCache, missing: dict, *others: object) -> np.ndarray:
            features, before = encode(cache, missing, *others), self._seen // PER_SHARD
            self._seen += len(missing)
            if self._seen // PER_SHARD > before:
                self.caching.append(round(resident_mb(), 1))
            return features

        FeatureCache._encode = noted

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Note the memory twenty times in all."""
        if state.global_step % max(1, state.max_steps // 20) == 0:
            self.epoch.append(round(resident_mb(), 1))


def run(pairs: int) -> dict:
    """Cache and train one epoch; return the memory on the way and the growth after the first quarter of each pass."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    memory, start = Memory(), time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shards").mkdir()
        write_shards(folder / "shards", pairs)
        rows = load_rows(str(folder / "shards"), streaming=True)
        columns = find_columns(rows.column_names)
        args = GroundingTrainingArguments(
            output_dir=str(folder / "run"),
            image_column=columns.image,
            caption_column=columns.caption,
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = GroundingTrainer(tiny(), args, rows, callbacks=[memory])
        trainer.train()
        cached = len(trainer.train_dataset.features.places)
    quarter = [values[-1] - values[len(values) // 4] for values in (memory.caching, memory.epoch)]
    return {
        "pairs": pairs,
        "cached": cached,
        "steps": trainer.state.global_step,
        "caching_mb": memory.caching,
        "epoch_mb": memory.epoch,
        "growth_mb_after_a_quarter": {"caching": round(quarter[0], 1), "epoch": round(quarter[1], 1)},
        "seconds": round(time.perf_counter() - start, 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=10_000)
    write("training_many_pairs", run(parser.parse_args().pairs))
