"""What the rules of `builder` cannot know of an architecture; nothing of this is in the package."""

from __future__ import annotations

from typing import Any

_INDEXER = dict(
    eos_token_id=2,
    indexer_n_heads=2,
    indexer_kv_heads=1,
    indexer_head_dim=8,
    indexer_budget=8,
    indexer_compress_ratio=2,
    ple_layer_ids=[1],
    ngram_vocab_size_base=50,
    split_ngram_parts=2,
    heads_per_ngram=2,
    ple_embed_dim=32,
    make_ngram_vocab_size_divisible_by=2,
)
_DRAFT = dict(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    hidden_size_per_layer_input=0,
    vocab_size_per_layer_input=0,
    num_kv_shared_layers=4,
    enable_moe_block=False,
    use_double_wide_mlp=False,
    layer_types=["sliding_attention", "full_attention"] * 2,
)
_SLIDING = dict(
    swa_num_attention_heads=4,
    swa_num_key_value_heads=4,
    swa_q_lora_rank=8,
    swa_kv_lora_rank=8,
    swa_head_dim=16,
    swa_qk_nope_head_dim=8,
    swa_v_head_dim=8,
)

SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": dict(attn_layer_indices=[1]),
    "blt": dict(num_hidden_layers=2, encoder_hash_byte_group_vocab=50),
    "cohere_compass_text": dict(
        rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    ),
    "dbrx": dict(attn_config=dict(rope_theta=1e4, clip_qkv=8)),
    "dory": dict(
        num_hidden_layers=3,
        n_input_layers=1,
        n_recurrent_layers=1,
        n_output_layers=1,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "dots1": dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2),
    "codegen": dict(rotary_dim=4),
    "dots3_note": dict(
        text_config=_SLIDING, audio_config=dict(adapter_input_size=32), vision_config=dict(per_layer_config={})
    ),
    "dots3_note_text": _SLIDING,
    "gemma4_assistant": dict(text_config=_DRAFT, backbone_hidden_size=32),
    "gemma4_unified_assistant": dict(text_config=_DRAFT, backbone_hidden_size=32),
    "gemma3n": dict(vision_config=dict(architecture="test_vit", hidden_size=32)),
    "gptj": dict(rotary_dim=4),
    "granitemoehybrid": dict(layer_types=["linear_attention", "full_attention"]),
    "hrm_text": dict(num_layers_per_stack=None),
    "deepseek_v2": dict(num_experts_per_tok=2),
    "reformer": dict(
        num_hidden_layers=2,
        attn_layers=["local", "lsh"],
        axial_pos_shape=(8, 16),
        axial_pos_embds_dim=(16, 16),
        num_buckets=4,
        local_attn_chunk_length=8,
        lsh_attn_chunk_length=8,
    ),
    "xlstm": dict(hidden_size=128, embedding_dim=128, num_heads=4),
    "zamba": dict(
        num_hidden_layers=4,
        layers_block_type=["linear_attention", "hybrid"] * 2,
        attention_hidden_size=64,
        attention_head_dim=16,
    ),
    "zamba2": dict(
        num_hidden_layers=4,
        layers_block_type=["linear_attention", "hybrid"] * 2,
        attention_hidden_size=64,
        attention_head_dim=16,
    ),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "longcat_flash": dict(head_dim=8),
    "mamba2": dict(num_heads=8, head_dim=8),
    "moshi": dict(sliding_window=64),
    "qwen4_exp": dict(text_config=_INDEXER),
    "qwen4_exp_text": _INDEXER,
    "recurrent_gemma": dict(num_hidden_layers=3),
    "xmod": dict(default_language="en_XX"),
}

# Draft heads share all their layers' keys with another model, which their config class cannot say of itself alone.
SET_AFTERWARDS: dict[str, dict[str, Any]] = {
    "gemma4_assistant": dict(num_kv_shared_layers=2),
    "gemma4_unified_assistant": dict(num_kv_shared_layers=2),
}
