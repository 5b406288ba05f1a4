"""A tiny random model of any architecture, made from its own config class by shrinking every field that is a size."""

from __future__ import annotations

import re
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.architectures.settings import SET_AFTERWARDS, SETTINGS

ARCHITECTURES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 100
LONG = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "sep_token_id": 2}

# The first rule whose pattern matches a field's whole name gives its size; a field that is smaller already stays.
RULES: list[tuple[str, int]] = [
    # Smaller ones make the choice of keys differ with a cache and without, in the bases themselves.
    (r"index_topk|keep_window_size", 64),
    (r"type_vocab_size|task_type_vocab_size", 2),
    (r".*vocab_size(_per_layer_input)?|.*vocab_size_base", VOCABULARY),
    (r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_.*_positions|context_length|model_max_length)", 128),
    (r"num_kv_shared_layers|num_nextn_predict_layers|num_mtp_layers", 0),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r".*(key_value_heads|kv_heads|kv_n_heads|key_heads|num_query_groups)", 2),
    (r"mamba_num_heads|mamba_n_heads|mamba_d_head", 8),
    (r"mamba_d_ssm", 64),
    (r"qk_head_dim", 16),
    (r".*(attention_heads|n_heads?|num_heads|value_heads|attention_head)", 4),
    (r".*(layers|n_layer|depth|num_blocks|layers_per_stack)", 2),
    (r".*(per_tok|per_token|top_?k|moe_k)", 2),
    (r"n_group|topk_group|num_expert_group|n_groups|mamba_n_groups|mamba_ngroups|o_groups", 1),
    (r".*(shared_experts|num_shared_experts)", 1),
    (r".*(experts|expert_num)", 4),
    (r".*(lora_rank|_rank|lowrank|dt_rank|time_step_rank)", 8),
    (r".*(head_dim|d_head|dim_head|headdim|head_size|d_kv|kv_channels|mamba_d_state|state_size|qk_rope_head_dim)", 8),
    (r".*(intermediate_size|intermediate_size_mlp|ffn_dim|d_ff|dff|dim_ff|d_inner|n_inner|ffn_hidden_size)", 48),
    (r".*(feed_forward_size|mlp_dim|prompt_mid_dim)", 48),
    (r".*(hidden_size|d_model|n_embd|emb_dim|embedding_size|embedding_dim|embed_dim|dim_model|hidden_size_global)", 32),
    (r".*(hidden_size_per_layer_input|_proj_dim|lru_width|adapter_in_dim|adapter_out_dim)", 32),
    (r".*(sliding_window|sliding_window_size|window_size|local_attention|attention_chunk_size)", 8),
    (r".*chunk_size", 8),
]


def build(model_type: str) -> nn.Module:
    """Return a tiny random LM in evaluation mode, the same one each time, in which every parameter matters."""
    torch.manual_seed(0)
    config = tiny_config(model_type)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    parts = [config, *(part for part in vars(config).values() if isinstance(part, PretrainedConfig))]
    own = next((part for part in parts if isinstance(part, model_class.config_class)), config)
    own._attn_implementation = "eager"
    for name, value in SET_AFTERWARDS.get(model_type, {}).items():
        setattr(own.get_text_config(), name, value)
    return wake(model_class._from_config(own).float()).eval()


def tiny_config(model_type: str) -> PretrainedConfig:
    """Return the architecture's config with every size shrunk, and what the table of settings says besides."""
    given = SETTINGS.get(model_type, {})
    return AutoConfig.for_model(model_type, **_merge(_shrink(_default_config(model_type)), given))


def _default_config(model_type: str) -> PretrainedConfig:
    """Return the config that the class makes of no arguments, or of the settings alone where it needs some."""
    try:
        return AutoConfig.for_model(model_type)
    except StrictDataclassError:
        return AutoConfig.for_model(model_type, **SETTINGS.get(model_type, {}))


def _merge(sizes: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    for name, value in given.items():
        sizes[name] = (
            _merge(dict(sizes[name]), value) if isinstance(sizes.get(name), dict) and isinstance(value, dict) else value
        )
    return sizes


def _shrink(config: PretrainedConfig) -> dict[str, Any]:
    """Return the fields to build a tiny config of the same class with."""
    layers = _chosen_layers(config)
    fields: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            fields[name] = _shrink(value)
        elif isinstance(value, (list, tuple)) and layers and len(value) == _depth(config):
            sizes = [_shrunk_number(name, v).get(name, v) if type(v) is int else v for v in value]
            fields[name] = type(value)(sizes[i] for i in layers)
        elif isinstance(value, int) and not isinstance(value, bool):
            fields |= _shrunk_number(name, value)
    if layers:
        fields |= {name: len(layers) for name in DEPTH if name in fields}
    if "kv_lora_rank" in fields:  # latent attention keeps one key for each head
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    return fields | {name: value for name, value in UNSET.items() if name in vars(config) and not vars(config)[name]}


def _shrunk_number(name: str, value: int) -> dict[str, int]:
    if name in LONG:
        return {name: LONG[name]}
    if re.fullmatch(r".*_token_(id|index)|.*_index", name):
        return {name: VOCABULARY - 2 - sum(map(ord, name)) % 8} if value >= VOCABULARY else {}
    for pattern, size in RULES:
        if re.fullmatch(pattern, name):
            return {name: min(size, value)} if value > 0 else {}
    return {}


# Fields that a config leaves open or off, and a decoder with attention heads wants.
UNSET = {"head_dim": 8, "is_decoder": True, "num_key_value_heads": 2}

DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")


def _depth(config: PretrainedConfig) -> int | None:
    return next((vars(config)[name] for name in DEPTH if isinstance(vars(config).get(name), int)), None)


def _chosen_layers(config: PretrainedConfig) -> list[int]:
    """Return the first layer of each kind that the config's lists tell apart, and at least two."""
    depth = _depth(config)
    lists = [v for v in vars(config).values() if isinstance(v, (list, tuple)) and len(v) == depth]
    if not depth or not lists:
        return []
    seen: set[tuple[int, str]] = set()
    chosen = []
    for layer in range(depth):
        kinds = {(i, str(values[layer])) for i, values in enumerate(lists) if isinstance(values[layer], str)}
        if kinds - seen:
            chosen.append(layer)
            seen |= kinds
    rest = [layer for layer in range(depth) if layer not in chosen]
    return sorted(chosen + rest[: max(0, 2 - len(chosen))])


@torch.no_grad()
def wake(lm: nn.Module) -> nn.Module:
    """Give weights that are too small to matter a size, and constant ones some noise, so that no path is silent."""
    generator = torch.Generator().manual_seed(1)
    for parameter in lm.parameters():
        if parameter.numel() < 2 or not parameter.is_floating_point():
            continue
        spread = float(parameter.std())
        if spread == 0:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        elif spread < 0.05 and parameter.dim() > 1:
            parameter.mul_(4)
    return lm
