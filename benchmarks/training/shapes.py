"""Models of published shapes with random weights, and batches whose captions are as long as web captions are."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
)

from visual_ground import GroundedModel, GroundingConfig, ground
from visual_ground.training.data.examples import ExampleCollator

sys.path.insert(0, str(Path(__file__).parent.parent))

WORDS, COLUMNS, LENGTH = 50265, 50272, 24


def _opt(width: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "ffn_dim": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


def _vit(width: int, layers: int, heads: int, patch: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "patch_size": patch,
    }


LANGUAGE = {
    "opt-125m": _opt(768, 12, 12),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "tiny": _opt(64, 2, 4),
}
VISION = {"vit-b/32": _vit(768, 12, 12, 32), "vit-l/14": _vit(1024, 24, 16, 14), "tiny": _vit(32, 2, 4, 32)}
# Conceptual Captions: 10.3 words a caption, standard deviation 4.5 (Sharma et al. 2018), at 1.15 tokens a word.
TOKENS_MEAN, TOKENS_DEVIATION = 11.8, 5.2


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of as many words as OPT's; "w7" is word 7."""
    # The special ones have names that no word begins with: a tokenizer cuts them out of whatever they stand in.
    words = {"<s>": 0, "<pad>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, WORDS)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", pad_token="<pad>", eos_token="</s>")


def pixels(images: list, return_tensors: str = "pt") -> dict[str, torch.Tensor]:
    """Stand in for an image processor."""
    return {"pixel_values": torch.zeros(len(images), 3, 224, 224)}


def parts(lm: str, vision: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple:
    """Return a random OPT and a random CLIP tower of these shapes."""
    torch.manual_seed(0)
    with torch.device(device):
        language = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("opt", vocab_size=COLUMNS, **LANGUAGE[lm]), dtype=dtype
        )
        tower = CLIPVisionModel(CLIPVisionConfig(image_size=224, **VISION[vision])).to(dtype)
    return language.eval().requires_grad_(False), tower.eval().requires_grad_(False)


def grounded(language: torch.nn.Module, tower: torch.nn.Module, **config: object) -> GroundedModel:
    """Ground them as published, or with other settings."""
    settings = GroundingConfig(**config) if config else GroundingConfig.preset("fromage")
    torch.manual_seed(1)
    return ground(language, tower, tokenizer(), pixels, settings)


def captions(count: int, seed: int = 0, full: bool = False) -> list[str]:
    """Return captions of random words, as long as web captions are, or all as long as fits."""
    generator = torch.Generator().manual_seed(seed)
    shape = (TOKENS_MEAN / TOKENS_DEVIATION) ** 2
    torch.manual_seed(seed)
    drawn = torch.distributions.Gamma(shape, shape / TOKENS_MEAN).sample((count,)).round().clamp(3, LENGTH - 2)
    lengths = [LENGTH - 2] * count if full else drawn.int().tolist()
    return [" ".join(f"w{i}" for i in torch.randint(3, WORDS, (n,), generator=generator).tolist()) for n in lengths]


def batch(model: GroundedModel, count: int, seed: int = 0, full: bool = False) -> dict:
    """Return one collated batch with random pixels."""
    collate = ExampleCollator(model, LENGTH, concat_captions_prob=0.0, end_captions=False)
    from PIL import Image

    blank = Image.new("RGB", (1, 1))
    examples = [
        {"row": i, "group": i, "caption": caption, "image": blank}
        for i, caption in enumerate(captions(count, seed, full))
    ]
    made = collate(examples)
    made["pixel_values"] = torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(seed))
    return made
