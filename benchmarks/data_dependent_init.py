"""What image tokens should imitate, and how deep in the LM, on the demo's weights and pictures (run `make demo` first).

    python benchmarks/data_dependent_init.py

Caption pair accuracy in percent on the validation concepts (eight wrong images a caption), before any step of training:
with image tokens fitted to their captions' words in closed form (`initialization.idf`), and after the imitation that
follows (`initialization.data_dependent`), with idf-weighted words of all of an image's captions as there, with all
words weighted alike, and with the last word of the shortest caption alone; and the first of these at other depths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import write
from torch import Tensor

from visual_ground import GroundedModel, ground
from visual_ground.demo.pairs import Pairs
from visual_ground.demo.weights import load_lm, load_vision
from visual_ground.evaluation.captions import caption_pair_accuracy
from visual_ground.evaluation.pairs import image_features
from visual_ground.training.data.examples import ExampleDataset
from visual_ground.training.initialization import data_dependent
from visual_ground.training.initialization.idf import fit_image_tokens_to_words, without_sentence_marks
from visual_ground.training.setup import standardise

CACHE = Path("demo/cache")
OTHER_DEPTHS = (0.13, 0.2, 0.35, 0.5)
Targets = Callable[[data_dependent.Imitation, Sequence[Mapping[str, Any]]], Tensor]
rare_words_more = data_dependent.target_hidden_states


def all_words_alike(imitation: data_dependent.Imitation, pairs: Sequence[Mapping[str, Any]]) -> Tensor:
    """Return each pair's own caption's mean state."""
    return _states(imitation, [pair["caption"] for pair in pairs], lambda count: [1 / count] * count)


def last_word_of_the_shortest(imitation: data_dependent.Imitation, pairs: Sequence[Mapping[str, Any]]) -> Tensor:
    """Return the state at the last token of the shortest caption of each pair's group."""
    shortest: dict[int, str] = {}
    for pair in pairs:
        shortest[pair["group"]] = min(shortest.get(pair["group"], pair["caption"]), pair["caption"], key=len)
    return _states(imitation, [shortest[pair["group"]] for pair in pairs], lambda count: [1e-9] * (count - 1) + [1.0])


def _states(imitation: data_dependent.Imitation, captions: list[str], weigh: Callable[[int], list[float]]) -> Tensor:
    texts = [imitation.model.processor.encode_text(" " + without_sentence_marks(text)) for text in captions]
    parts = [texts[i : i + 64] for i in range(0, len(texts), 64)]
    return torch.cat([imitation.text_states(part, [weigh(len(text)) for text in part]) for part in parts])


def accuracy(model: GroundedModel, pairs: Pairs, targets: Targets | None, depth: float = data_dependent.DEPTH) -> float:
    """Fit the image projection anew, in closed form and by imitation; return the caption pair accuracy."""
    examples = ExampleDataset(pairs.examples(), features=pairs.example_features())
    sampled = data_dependent.evenly_sampled(examples)
    features = torch.cat([image_features(model, sampled[i : i + 128]) for i in range(0, len(sampled), 128)])
    if targets is None:
        captions, groups = [row["caption"] for row in sampled], [row["group"] for row in sampled]
        fit_image_tokens_to_words(model, captions, features, groups)
    else:
        data_dependent.target_hidden_states, data_dependent.DEPTH = targets, depth
        data_dependent.start_image_tokens(model, sampled, features)
    texts, features = pairs.pairs(pairs.numbers("validation"))
    return round(caption_pair_accuracy(model, texts, features, wrong_images=8), 1)


def main() -> None:
    """Measure, print and write results/data_dependent_init.json."""
    lm, tokenizer = load_lm(CACHE)
    vision = load_vision()
    pairs = Pairs(CACHE, vision, None)
    model = ground(lm, vision, tokenizer).eval()
    standardise(model, ExampleDataset(pairs.examples(), features=pairs.example_features()))
    figures = {"closed form": accuracy(model, pairs, None)}
    ways = {
        "rare words more": rare_words_more,
        "all words alike": all_words_alike,
        "last word of the shortest": last_word_of_the_shortest,
    }
    figures |= {name: accuracy(model, pairs, targets) for name, targets in ways.items()}
    by_depth = {str(depth): accuracy(model, pairs, rare_words_more, depth) for depth in OTHER_DEPTHS}
    write("data_dependent_init", {"caption_pair_accuracy": figures, "by_depth": by_depth})


if __name__ == "__main__":
    main()
