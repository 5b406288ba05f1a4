"""Teach a frozen LM to answer easy-VQA's questions, through the layer that makes image tokens alone.

    python -m benchmarks.easy_vqa --out runs/easy_vqa --cache demo/cache --bf16
    python -m benchmarks.demo_task easy-vqa --adapter runs/easy_vqa/adapter --cache demo/cache

The LM is SmolLM2-135M-Instruct, or with `--lm gemma3` Gemma 3 270M.

Nothing of the language model or the image encoder is trained. The layer starts from a ridge regression onto the
embeddings of the image's colour and shape, and is then trained on the answers to the training questions. A question
comes before its image, so that its keys and values are computed once for all images.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from benchmarks.transfer import common
from visual_ground import GroundedModel, GroundingConfig, ground
from visual_ground.demo.weights import load_vision
from visual_ground.evaluation.running.questions import Question
from visual_ground.evaluation.tasks.answers.easy_vqa import COLOURS, SHAPES, EasyVQA
from visual_ground.regression import ridge
from visual_ground.training.speedups.kv_cache import SharedPrefixCache, fixed_cache
from visual_ground.vision.features.cache import FeatureCache

NUM_TOKENS = 4
BATCH = 64
# Of the weights; the bias, a soft prompt that all images share, gets a rate of its own.
RATE = 0.2
STAND_IN: Any = Image.new("RGB", (1, 1))


def image_words(task: EasyVQA) -> dict[int, tuple[str, str]]:
    """Return for each image whose colour and shape the answers tell these two."""
    told: dict[int, dict[str, str]] = defaultdict(dict)
    for question, answer, image in task.read("train"):
        affirmed = answer == "yes" and not {"not", "no"} & set(question.split())
        for kind, words in (("colour", COLOURS), ("shape", SHAPES)):
            named = [word for word in words if word in question.strip("?").split()] if affirmed else []
            named += [answer] if answer in words else []
            if named:
                told[image][kind] = named[0]
    return {image: (both["colour"], both["shape"]) for image, both in told.items() if len(both) == 2}


def start(model: GroundedModel, task: EasyVQA, images: list[int], features: Tensor) -> None:
    """Fit the image tokens to the embeddings of the colour, the shape, and twice nothing."""
    adapter, words = model.adapter, image_words(task)
    adapter.feature_mean.copy_(features.mean(0))
    adapter.feature_std.copy_(features.std(0) + 1e-3)
    rows = [row for row, image in enumerate(images) if image in words]
    ids = [[model.processor.continue_text(f" {word}")[0] for word in words[images[row]]] for row in rows]
    embeddings = (model.frozen_lm.embed(torch.tensor(ids)) - adapter.embedding_mean) / adapter.embedding_std
    fitted = ridge(adapter.standardize(features[rows]), embeddings.flatten(1))
    with torch.no_grad():
        for parameter, value in zip(adapter.image_projection.parameters(), (fitted.weight, fitted.bias), strict=True):
            parameter.zero_()
            parameter[: len(value)] = value


def train(model: GroundedModel, task: EasyVQA, images: list[int], features: Tensor, steps: int, seed: int) -> None:
    """Train the image tokens on the answers, a batch at a time of questions with equally many ids."""
    row = {image: i for i, image in enumerate(images)}
    by_length: dict[int, list[tuple[tuple[int, ...], list[int], int, int]]] = defaultdict(list)
    for question, answer, image in task.read("train"):
        encoded = model.processor.encode(task.prompt.parts(Question(question, STAND_IN))).ids
        cut = next(i for i, token in enumerate(encoded) if token < 0)
        target = model.processor.continue_text(f" {answer}")[0]
        by_length[cut].append((encoded[:cut], [t for t in encoded[cut:] if t >= 0], target, row[image]))
    # One for each length, as one alone keeps fewer than there are questions.
    prefixes = {length: SharedPrefixCache(model) for length in by_length}
    lengths, draw = sorted(by_length), random.Random(seed)
    weights = [len(by_length[length]) for length in lengths]
    optimizer = torch.optim.AdamW(
        model.adapter.projector_groups(RATE / model.adapter.feature_dim), betas=(0.9, 0.95), weight_decay=0
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=steps, pct_start=0.1
    )
    began, right, seen = time.perf_counter(), 0, 0
    for step in range(steps):
        model.zero_grad()
        for _ in range(2):
            length = draw.choices(lengths, weights)[0]
            examples = draw.choices(by_length[length], k=BATCH // 2)
            loss, hits = answer_loss(model, prefixes[length], examples, features)
            (loss / 2).backward()
            right, seen = right + hits, seen + len(examples)
        optimizer.step()
        schedule.step()
        if step % 20 == 19:
            print(f"step {step + 1}: right {100 * right / seen:.1f} %, {time.perf_counter() - began:.0f} s", flush=True)
            right, seen = 0, 0


def answer_loss(model: GroundedModel, prefixes: SharedPrefixCache, examples: list[Any], features: Tensor) -> Any:
    """Return the cross entropy of the answers' first ids, and how many of these are the likeliest."""
    count, tail, first = len(examples), examples[0][1], model.frozen_lm.vocabulary.first_image_id
    known = [prefixes.get(prefix) for prefix, *_ in examples]
    layers = [
        tuple(torch.cat([one[layer][side] for one in known]) for side in (0, 1)) for layer in range(len(known[0]))
    ]
    marks = first + torch.arange(count * NUM_TOKENS).view(count, NUM_TOKENS)
    ids = torch.cat([marks, torch.tensor(tail).expand(count, -1)], 1)
    length = layers[0][0].shape[-2] + ids.shape[1]
    tokens = model.active.image_tokens(image_features=features[[image for *_, image in examples]])
    last = torch.arange(1, count + 1) * ids.shape[1] - 1
    options = {"cache": fixed_cache(layers), "use_cache": True}
    reading = model.frozen_lm.read(ids, torch.ones(count, length, dtype=torch.long), last, tokens, **options)
    targets = torch.tensor([target for _, _, target, _ in examples])
    return F.cross_entropy(reading.logits.float(), targets), int((reading.logits.argmax(-1) == targets).sum())


def main() -> None:
    """Fit, train, save the adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter")
    parser.add_argument("--cache", type=Path, required=True, help="the demo's cache, with the language model")
    parser.add_argument("--lm", choices=["smollm2", "gemma3"], default="smollm2")
    parser.add_argument("--features", type=Path, help="folder of image features; OUT/features")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="run the language model in bfloat16")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    common.CACHE = options.cache
    (lm, tokenizer), vision, task = common.load_lm(options.lm), load_vision(), EasyVQA()
    lm = lm.to(torch.bfloat16) if options.bf16 else lm
    model = ground(lm, vision, tokenizer, config=GroundingConfig(num_visual_tokens=NUM_TOKENS))
    paths = task.image_paths("train")
    images = sorted(paths)
    cache = FeatureCache(options.features or options.out / "features", vision)
    features = cache.features([paths[image] for image in images], progress=True).float()
    start(model, task, images, features)
    train(model, task, images, features, options.steps, options.seed)
    model.active.record_training({"method": "answers of easy-VQA", "steps": options.steps, "seed": options.seed})
    model.save_pretrained(options.out / "adapter")


if __name__ == "__main__":
    main()
