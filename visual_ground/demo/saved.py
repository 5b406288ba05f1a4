"""What the demo leaves behind to talk to: its adapter, and an index of its pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visual_ground.demo.emoji import Concept
from visual_ground.demo.pairs import CAPTION_KINDS
from visual_ground.demo.weights import load_lm, load_vision
from visual_ground.errors import GroundingStateError
from visual_ground.index.image_index import ImageIndex
from visual_ground.model import GroundedModel

ADAPTER, INDEX = "adapter", "index"
DATASET = "OpenMoji and Twemoji"
# Who drew the pictures that the demo shows.
CREDIT = {"credit": "OpenMoji", "licence": "CC BY-SA 4.0"}
PAGE = "https://openmoji.org/library/emoji-{}/"


def record_results(model: GroundedModel, results: Mapping[str, Any], unseen: int, split: str) -> None:
    """Put what `demo.run.evaluate` measured into the report of the model's adapter, and so into its card."""
    accuracy = {"caption_pair_accuracy": results["caption_pair_accuracy"]}
    pairs = unseen * len(CAPTION_KINDS)
    report = model.active.report.measured(
        f"{DATASET}, concepts seen in training", results["seen"], pairs, split="train"
    )
    unseen_results = {**results["unseen"], **accuracy}
    model.active.report = report.measured(f"{DATASET}, unseen concepts", unseen_results, pairs, split=split)


def save_demo(model: GroundedModel, index: ImageIndex, concepts: list[Concept], out: Path) -> None:
    """Write the adapter and the index, which has the pictures of all concepts, in order, by their names."""
    model.save_pretrained(out / ADAPTER)
    index.update(index.ids, metadata=[{**CREDIT, "source": PAGE.format(c.code.upper())} for c in concepts])
    index.save_pretrained(out / INDEX)


def load_demo(out: Path, cache: Path) -> tuple[GroundedModel, ImageIndex]:
    """Return the demo's model with its adapter, and its index; `cache` is its folder for the weights of both models.

    Raises:
        GroundingStateError: the demo has not run.
    """
    if not all((out / name).is_dir() for name in (ADAPTER, INDEX)):
        raise GroundingStateError(
            f"{out} has no adapter and index of the demo. Run `make demo` first, or name a language model, an adapter "
            "and an index."
        )
    index = ImageIndex.from_pretrained(out / INDEX)
    lm, tokenizer = load_lm(cache)
    return GroundedModel.from_pretrained(lm, out / ADAPTER, load_vision(cache), tokenizer), index
