"""Tiny random language models of very different families, built from their configs: no download, no tokenizer."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

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
