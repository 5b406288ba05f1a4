"""What grounding costs an LM that was there already: memory, text-only speed, and the import.

python benchmarks/attaching.py
"""

from __future__ import annotations

import subprocess
import sys
import time

import torch
from measure import alternate, resident_mb, write
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from visual_ground import ground


class Eye(torch.nn.Module):
    """A vision encoder with 768 features."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 768)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Map pixels (n, 3, h, w) to (n, 768)."""
        return self.layer(pixels.mean((2, 3)))


def words(count: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer with so many words."""
    backend = Tokenizer(models.WordLevel({"<s>": 0, **{f"w{i}": i for i in range(1, count)}}, unk_token="<s>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<s>")


def llama(**settings: int | bool) -> torch.nn.Module:
    """Return a random Llama."""
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **settings)).eval()


def pixels(images: list, return_tensors: str = "pt") -> dict[str, torch.Tensor]:
    """Stand in for an image processor."""
    return {"pixel_values": torch.zeros(len(images), 3, 8, 8)}


def memory() -> dict[str, float]:
    """Ground an LM with 150,000 x 1,024 embeddings, tied and untied; return MB before, grown by, and the adapter's."""
    results = {}
    for tied in (True, False):
        sizes = dict(vocab_size=150_000, hidden_size=1024, intermediate_size=1024, num_hidden_layers=1)
        lm = llama(**sizes, num_attention_heads=8, tie_word_embeddings=tied)
        tokenizer, eye = words(150_000), Eye()
        lm(input_ids=torch.ones(1, 2, dtype=torch.long))
        before = resident_mb()
        model = ground(lm, eye, tokenizer, pixels)
        grown = resident_mb() - before
        adapter = sum(t.nbytes for t in model.adapter.state_dict().values()) / 1e6
        name = "tied" if tied else "untied"
        results[name] = {"before_mb": round(before, 1), "grown_mb": round(grown, 1), "adapter_mb": round(adapter, 1)}
    return results


def text_only() -> dict[str, float]:
    """Time 32 greedy tokens of an LM of SmolLM2-135M's shape by itself and grounded, by turns."""
    lm = llama(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    ids = torch.randint(1, 49000, (1, 32))
    options = dict(max_new_tokens=32, min_new_tokens=32, do_sample=False, pad_token_id=0)
    run = lambda model: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)  # noqa: E731
    model = ground(lm, Eye(), words(49152), pixels)

    def base() -> None:
        model.frozen_lm.virtual_tokens.detach()
        run(lm)

    def grounded() -> None:
        if not model.frozen_lm.virtual_tokens.attached:
            model.frozen_lm.virtual_tokens.attach()
        run(lm)

    with torch.no_grad():
        return alternate(base, grounded, rounds=9)


def imports() -> dict[str, float]:
    """Time a fresh interpreter that imports transformers' AutoModelForCausalLM, and one that imports ground."""

    def python(code: str) -> None:
        subprocess.run([sys.executable, "-c", code], check=True)

    return alternate(
        lambda: python("import torch; from transformers import AutoModelForCausalLM"),
        lambda: python("from visual_ground import ground"),
        rounds=7,
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    start = time.time()
    results = {"memory": memory(), "text_only_generation": text_only(), "imports": imports()}
    write("attaching", {**results, "seconds": round(time.time() - start)})
