"""Tiny random language models of very different families, built from their configs: no download, no tokenizer."""

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from visual_ground import GroundingConfig, ground

COMMON = dict(vocab_size=100, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LLAMA = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8
)

FAMILIES = {
    "llama_untied": ("llama", dict(LLAMA, tie_word_embeddings=False)),
    "opt_projected": (
        "opt",
        dict(hidden_size=32, word_embed_proj_dim=16, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4),
    ),
    "gpt2": ("gpt2", dict(n_embd=32, n_layer=2, n_head=4)),
    "qwen2_tied": ("qwen2", dict(LLAMA, tie_word_embeddings=True)),
    "gemma2_scaled_capped": ("gemma2", dict(LLAMA, query_pre_attn_scalar=8)),
    "gpt_neox_parallel": (
        "gpt_neox",
        dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4),
    ),
    "mixtral_moe": ("mixtral", dict(LLAMA, num_local_experts=4, num_experts_per_tok=2)),
    "mamba": ("mamba", dict(hidden_size=32, state_size=4, num_hidden_layers=2)),
    "bloom": ("bloom", dict(hidden_size=32, n_layer=2, n_head=4)),
}


def build(family: str, **changes):
    """Return a tiny LM in eval mode with weights large enough that every path matters."""
    torch.manual_seed(0)
    model_type, settings = FAMILIES[family]
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**COMMON, **settings, **changes}))
    return lm.eval().requires_grad_(False)


def tokenizer(num_tokens: int = 100, bos: bool = True, template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer: "w4 w5" becomes 4, 5, after BOS (1) where `bos`."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, num_tokens)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    special = dict(unk_token="<unk>", eos_token="</s>", **(dict(bos_token="<s>", pad_token="<pad>") if bos else {}))
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special)


class Eye(torch.nn.Module):
    """A tiny vision encoder: pixels (n, 3, 8, 8) to features (n, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3 * 8 * 8, 12)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.layer(pixels.flatten(1))


def image_processor(images, return_tensors="pt"):
    """Map PIL images to pixels (n, 3, 8, 8)."""
    arrays = [np.asarray(image.resize((8, 8)), dtype=np.float32) / 127.5 - 1 for image in images]
    return {"pixel_values": torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)}


def grounded(family: str = "llama_untied", num_tokens: int = 100, bos: bool = True, lm=None, **config):
    """Return a grounded tiny LM whose adapter has random weights large enough that every path matters."""
    lm = build(family) if lm is None else lm
    settings = GroundingConfig(
        **{
            "retrieval_dim": 6,
            "caption_prompt": "w7 w8",
            "image_prompt": "w7 {image} w8",
            "retrieval_prompt": "",
            **config,
        }
    )
    model = ground(lm, Eye(), tokenizer(num_tokens, bos), image_processor, settings)
    with torch.no_grad():
        model.adapter.ret_input.add_(torch.randn_like(model.adapter.ret_input) * 0.1)
    return model.eval()


def picture(seed: int = 0) -> Image.Image:
    """Return a random 8 x 8 image."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8))
