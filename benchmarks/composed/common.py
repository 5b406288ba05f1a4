"""What tasks of composed retrieval share: the frozen models, and how a task is scored."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from visual_ground import GroundedModel, GroundingTrainer, GroundingTrainingArguments, fit, ground
from visual_ground.demo.weights import load_lm, load_vision
from visual_ground.lm.base.loading import multiplies_bfloat16

CACHE = Path(os.environ.get("DEMO_CACHE", "demo/cache"))
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Query:
    """A picture to ask with, what is said, and which pictures of the gallery are right.

    Args:
        prompt: the picture and the text, in the order in which they are said.
        picture: the picture alone.
        text: the text alone.
        right: the gallery's numbers.
        hidden: the number of the picture itself, which is not to be found; None where it is not in the gallery.
        guess: what one finds who knows what the text means and guesses the rest, from 0 to 1.
    """

    prompt: list[Any]
    picture: Any
    text: str
    right: frozenset[int]
    hidden: int | None
    guess: float


def fitted(rows: Sequence[dict[str, Any]], out: Path, seed: int = 0) -> tuple[GroundedModel, float]:
    """Return SmolLM2-135M with an adapter that was fitted to the rows, without a training step, and the seconds."""
    lm, tokenizer = load_lm(CACHE)
    # When `[RET]` is said is not measured here, and need not be fitted.
    tokenizer.chat_template = None
    torch.manual_seed(seed)
    model = ground(lm, load_vision(), tokenizer)
    settings = dict(
        output_dir=str(out),
        prefix_cache_gb=1.0,
        max_caption_length=48,
        use_cpu=True,
        report_to="none",
        bf16=multiplies_bfloat16(),
    )
    start = time.perf_counter()
    fit(model, rows, GroundingTrainingArguments(**settings))
    return model, time.perf_counter() - start


def train(model: GroundedModel, rows: Sequence[dict[str, Any]], out: Path, steps: int, seed: int = 0) -> float:
    """Train image tokens and retrieval layers on the rows' prompts, from where `fit` left them; return the seconds.

    Args:
        model: the grounded model.
        rows: in the order in which batches are made of them: what stands side by side is told apart.
        out: where the run writes.
        steps: how many, of 32 rows each.
        seed: of the run.
    """
    args = GroundingTrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=32,
        projector_learning_rate=1e-3,
        retrieval_learning_rate=3e-4,
        lr_scheduler_type="cosine",
        caption_loss_scale=0,
        held_out=0,
        train_sampling_strategy="sequential",
        max_caption_length=48,
        use_cpu=True,
        bf16=multiplies_bfloat16(),
        save_strategy="no",
        report_to="none",
        seed=seed,
    )
    start = time.perf_counter()
    GroundingTrainer(model=model, args=args, train_dataset=list(rows)).train()
    model.eval()
    return time.perf_counter() - start


def score(model: GroundedModel, queries: Sequence[Query], gallery: Sequence[Any]) -> dict[str, float]:
    """Return R@1, in percent, of pictures and texts together and of each alone."""
    images = model.embed_images(gallery)

    def first(vectors: torch.Tensor) -> float:
        scores = vectors @ images.T
        for row, query in zip(scores, queries, strict=True):
            if query.hidden is not None:
                row[query.hidden] = -2
        found = scores.argmax(1).tolist()
        return round(100 * sum(n in q.right for n, q in zip(found, queries, strict=True)) / len(queries), 1)

    return {
        "queries": len(queries),
        "gallery": len(gallery),
        "composed": first(in_parts(model.embed_text, [query.prompt for query in queries])),
        "text only": first(in_parts(model.embed_text, [[{"type": "text", "text": q.text}] for q in queries])),
        "text only, guessing the rest": round(100 * sum(query.guess for query in queries) / len(queries), 1),
        "picture only": first(model.embed_images([query.picture for query in queries])),
    }


def in_parts(embed: Callable[[Any], torch.Tensor], prompts: Sequence[Any], size: int = 32) -> torch.Tensor:
    """Embed prompts, so many at once."""
    return torch.cat([embed(prompts[i : i + size]) for i in range(0, len(prompts), size)])


def report(name: str, results: dict[str, Any]) -> None:
    """Print the results and write them beside this file."""
    text = json.dumps(results, indent=1)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(text + "\n")
