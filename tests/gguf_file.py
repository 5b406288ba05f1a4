"""Writes a tiny llama as a GGUF file, with or without a tokenizer."""

import json
from pathlib import Path

import numpy as np

from tests.paths import GOLDEN
from tests.tiny import build


def write_gguf(path: Path, with_tokenizer: bool = False, **changes):
    """Write a tiny llama as a GGUF file, and return the LM whose weights it holds.

    Args:
        path: the file.
        with_tokenizer: put the tokenizer of tests/golden/lm into the file.
        changes: to the LM's config.
    """
    import gguf

    lm = build("llama_untied", num_key_value_heads=4, **changes)
    writer = gguf.GGUFWriter(path, "llama")
    _write_settings(writer, lm.config)
    if with_tokenizer:
        _write_tokenizer(writer, lm.config.vocab_size)
    names = _tensor_names(lm.config.num_hidden_layers)
    for name, tensor in lm.state_dict().items():
        module = name.removesuffix(".weight")
        array = tensor.numpy().astype(np.float32)
        if module.endswith(("q_proj", "k_proj")):  # GGUF keeps the halves of each rotary head interleaved.
            heads = lm.config.num_attention_heads
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(f"{names[module]}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return lm


def _write_settings(writer, config) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _write_tokenizer(writer, vocab_size: int) -> None:
    ids = json.loads((GOLDEN / "lm" / "vocab.json").read_text())
    tokens = {i: token for token, i in ids.items()}
    merges = [line for line in (GOLDEN / "lm" / "merges.txt").read_text().splitlines() if not line.startswith("#")]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([tokens.get(i, f"[unused{i}]") for i in range(vocab_size)])
    writer.add_token_types([1] * vocab_size)
    writer.add_token_merges(merges)
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id):
        add(ids["</s>"])
    writer.add_pad_token_id(ids["<pad>"])


def _tensor_names(num_layers: int) -> dict[str, str]:
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    inner = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output"}
    inner |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"}
    inner |= {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    for i in range(num_layers):
        names |= {f"model.layers.{i}.{ours}": f"blk.{i}.{theirs}" for ours, theirs in inner.items()}
    return names
