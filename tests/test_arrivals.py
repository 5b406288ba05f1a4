"""Every way in which a language model arrives: each answers, learns, and is handed back as it came."""

import copy
import pickle
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.tiny import Eye, build, grounded, image_processor, picture, tokenizer
from visual_ground import GroundedModel, GroundingConfig, GroundingError, ImageIndex, ground
from visual_ground.adapter.files import AdapterFiles
from visual_ground.errors import GroundingStateError, GroundingTypeError, GroundingValueError

GREEDY = dict(max_new_tokens=6, do_sample=False)
PROMPTS = ["w4 w5 w6", ["w9", picture(0), "w5", picture(1)]]
# Torch's and PEFT's own words about quantised and half-precision tensors.
quiet = pytest.mark.filterwarnings("ignore")


def learn(model):
    """Take one step that makes the first picture's rows matter, and return the adapter's gradients by name."""
    model.train()
    inputs = model.prepare([["w7", picture(0), "w5 w6"]], padding_side="right")
    with model.frozen_lm.bind(model.active.image_tokens(inputs["pixel_values"])):
        logits = model.frozen_lm.run(inputs["input_ids"], inputs["attention_mask"], use_cache=False).logits
    target = torch.tensor([5, 6])
    loss = F.cross_entropy(logits[0, -3:-1].float(), target.to(logits.device))
    model.zero_grad()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.adapter.named_parameters() if p.grad is not None}
    model.eval()
    return gradients


def answers_and_learns(model):
    index = ImageIndex.build(model, [picture(i) for i in range(3)])
    answers = model.generate(PROMPTS, index, ret_bias=100.0, **GREEDY)
    assert all(answer.images for answer in answers)
    assert torch.isfinite(model.embed_text(PROMPTS)).all()
    gradients = learn(model)
    assert {"image_projection.weight", "ret_output" if not model.adapter.tied else "ret_input"} <= set(gradients)
    assert all(torch.isfinite(g).all() for g in gradients.values()) and gradients["image_projection.weight"].any()
    assert all(p.dtype == torch.float32 for p in model.adapter.parameters())


def folder_of(lm, path):
    lm.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama_untied", "qwen2_tied"])
def test_half_precision(family, dtype):
    lm = build(family).to(dtype)
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    model = grounded(lm=lm)
    answers_and_learns(model)
    model.unground()
    assert all(torch.equal(before[name], value) for name, value in lm.state_dict().items())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_and_a_static_cache(attention):
    lm = build("llama_untied")
    lm.set_attn_implementation(attention)
    model = grounded(lm=lm)
    answers_and_learns(model)
    static = model.generate(PROMPTS, cache_implementation="static", **GREEDY)
    assert [str(a) for a in static] == [str(a) for a in model.generate(PROMPTS, **GREEDY)]


def test_a_folder(tmp_path):
    model = ground(folder_of(build("llama_untied"), tmp_path), Eye(), image_processor=image_processor)
    assert model.active.provenance["base_model_name_or_path"] == str(tmp_path)
    answers_and_learns(model.eval())


@quiet
@pytest.mark.parametrize("offload_ends", [False, True])
@pytest.mark.parametrize("family", ["llama_untied", "qwen2_tied"])
def test_weights_on_disk(family, offload_ends, tmp_path):
    from transformers import AutoModelForCausalLM

    plain = build(family)
    name = folder_of(plain, tmp_path / "lm")
    ends = "disk" if offload_ends else "cpu"
    places = {"model.embed_tokens": ends, "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": ends}
    lm = AutoModelForCausalLM.from_pretrained(name, device_map=places, offload_folder=str(tmp_path / "offload"))
    assert any(p.device.type == "meta" for p in lm.parameters())
    model, other = grounded(lm=lm), grounded(lm=plain)
    assert model.adapter.tied == other.adapter.tied
    assert torch.allclose(model.adapter.embedding_mean, other.adapter.embedding_mean, atol=1e-5)
    assert torch.allclose(model.adapter.ret_norms, other.adapter.ret_norms, atol=1e-4)
    answers_and_learns(model)


def bits(kind):
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "bitsandbytes 4-bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    if kind == "bitsandbytes 8-bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    import torchao.quantization as ao

    if kind == "torchao int8":
        return TorchAoConfig(ao.Int8WeightOnlyConfig())
    if kind == "torchao int8 with its head":
        return TorchAoConfig(ao.Int8WeightOnlyConfig(), include_input_output_embeddings=True)
    return TorchAoConfig(ao.IntxWeightOnlyConfig(torch.int4))


@quiet
@pytest.mark.parametrize(
    "kind",
    ["bitsandbytes 4-bit", "bitsandbytes 8-bit", "torchao int8", "torchao int8 with its head", "torchao int4"],
)
def test_quantised(kind, tmp_path):
    from transformers import AutoModelForCausalLM

    sizes = dict(hidden_size=64, intermediate_size=128, head_dim=16)
    name = folder_of(build("llama_untied", **sizes), tmp_path)
    lm = AutoModelForCausalLM.from_pretrained(name, quantization_config=bits(kind), device_map="cpu")
    model = ground(lm, Eye(), image_processor=image_processor, config=GroundingConfig(retrieval_dim=6)).eval()
    answers_and_learns(model)
    assert float(model.adapter.ret_norms[1]) == pytest.approx(
        float(build("llama_untied", **sizes).lm_head.weight.norm(dim=-1).mean()), rel=0.05
    )
    with model.disable_adapter():
        assert lm(torch.tensor([[4, 5]])).logits.shape[-1] == 100


def test_a_head_that_hooks_cannot_read_is_refused_before_training():
    class WholeNumbers(torch.nn.Module):
        """A head that reads 8-bit numbers, as a fused kernel does."""

        def __init__(self, head):
            super().__init__()
            self.head = head

        def forward(self, hidden):
            return self.head(hidden.float() / 16)

    lm = build("llama_untied")
    lm.lm_head = WholeNumbers(lm.lm_head)
    handle = lm.model.norm.register_forward_hook(lambda module, args, out: (out * 16).round().to(torch.int8))
    with pytest.raises(GroundingTypeError, match="floating-point numbers are needed"):
        grounded(lm=lm)
    handle.remove()


@quiet
def test_a_loaded_lora_stays_frozen_and_an_adapter_of_load_adapter_too(tmp_path):
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(build("llama_untied"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path)
    lm = build("llama_untied")
    lm.load_adapter(str(tmp_path))
    model = grounded(lm=lm)
    assert not any(p.requires_grad for p in lm.parameters())
    answers_and_learns(model)
    ids = torch.tensor([[4, 5, 6]])
    assert torch.allclose(model(ids).logits[..., :100], tuned(ids).logits, atol=1e-5)


@quiet
def test_a_lora_is_trained_with_the_adapter_where_asked_and_saved_beside(tmp_path):
    from peft import LoraConfig, get_peft_model

    from visual_ground import GroundingTrainer, GroundingTrainingArguments

    plain = build("llama_untied").requires_grad_(True)
    with pytest.raises(GroundingValueError, match="get_peft_model"):
        grounded(lm=plain, train_lm_adapter=True)
    assert all(p.requires_grad for p in plain.parameters())
    lm = get_peft_model(build("llama_untied"), LoraConfig(r=2, target_modules=["q_proj"]))
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    model = grounded(lm=lm, train_lm_adapter=True)
    pairs = [{"image": picture(i), "caption": f"w{10 + i} w5 w6"} for i in range(8)]
    args = GroundingTrainingArguments(
        str(tmp_path / "run"), max_steps=3, per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True
    )
    GroundingTrainer(model, args, pairs).train()
    changed = {name for name, value in lm.state_dict().items() if not torch.equal(before[name], value)}
    assert changed and all("lora_" in name for name in changed)
    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = GroundedModel.from_pretrained(
        build("llama_untied"), tmp_path / "adapter", Eye(), tokenizer(), image_processor
    )
    loaded.vision.load_state_dict(model.vision.state_dict())
    inputs = model.prepare(PROMPTS)
    assert torch.allclose(loaded(**inputs).logits, model(**inputs).logits, atol=1e-5)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert (
        loaded.active.metadata.fingerprint == loaded.active.spec.fingerprint
    )  # It is of the LM without what PEFT put there.
    (tmp_path / "adapter" / "lm_adapter" / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(GroundingError, match="damaged"):
        model.active.load_weights(tmp_path / "adapter", model.lm)
    (tmp_path / "adapter" / "lm_adapter" / "adapter_config.json").unlink()
    with pytest.raises(GroundingError, match="are missing"):
        GroundedModel.from_pretrained(build("llama_untied"), tmp_path / "adapter", model.vision, tokenizer())


@quiet
@pytest.mark.parametrize("grounded_first", [True, False])
def test_a_compiled_lm_gives_the_same(grounded_first):
    lm = build("llama_untied")
    model = grounded(lm=lm)
    inputs = model.prepare(PROMPTS)
    plain, said = model(**inputs).logits, model.generate(PROMPTS, **GREEDY)
    if grounded_first:
        lm.compile(backend="eager")
    else:
        state = model.adapter.state_dict()
        model.unground().compile(backend="eager")
        model = grounded(lm=lm)
        model.adapter.load_state_dict(state)
        torch.manual_seed(0)
    if grounded_first:
        assert torch.allclose(model(**inputs).logits, plain, atol=1e-5)
        assert [str(a) for a in model.generate(PROMPTS, **GREEDY)] == [str(a) for a in said]
    assert learn(model)["image_projection.weight"].any()


@torch.no_grad()
def test_adapters_are_switched_by_name(tmp_path):
    model = grounded("llama_untied")
    model.save_pretrained(tmp_path / "one")
    inputs = model.prepare(PROMPTS)
    first = model(**inputs).logits
    model.add_adapter("new", GroundingConfig(num_visual_tokens=2, retrieval_dim=4, mask_spare_columns=True))
    assert model.active_adapter == "default" and torch.equal(model(**inputs).logits, first)
    model.set_adapter("new")
    assert model.embed_images([picture()]).shape == (1, 4)
    assert model.prepare(PROMPTS)["input_ids"].shape[1] == inputs["input_ids"].shape[1] + 2
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith("adapters.attached.new.") for name in trained)
    model.active.record_training({"steps": 2})
    model.save_pretrained(tmp_path / "two")
    saved = AdapterFiles.open(tmp_path / "two")
    model.set_adapter("default")
    assert model.active.report.training == {}
    assert torch.equal(model(**inputs).logits, first)
    model.load_adapter(tmp_path / "two", "again")
    model.set_adapter("again")
    assert model.active.metadata.provenance == saved.metadata.provenance and model.active.report.training == {
        "steps": 2
    }
    assert model.config.num_visual_tokens == 2 and not any(p.requires_grad for p in model.parameters())
    other = GroundedModel.from_pretrained(build("llama_untied"), tmp_path / "two", model.vision, tokenizer())
    assert torch.equal(model.embed_images([picture()]), other.embed_images([picture()]))
    for call in (
        lambda: model.set_adapter("none"),
        lambda: model.add_adapter("new"),
        lambda: model.add_adapter("a.b"),
        lambda: model.delete_adapter("again"),
        lambda: model.load_adapter(tmp_path / "none", "x", local_files_only=True),
    ):
        with pytest.raises(GroundingError):
            call()
    narrow = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(GroundingValueError, match="this model needs"):
        model.load_adapter(tmp_path / "two", "x", narrow, image_processor)
    assert list(model.adapters) == ["default", "new", "again"]
    with pytest.raises(GroundingStateError, match="active"):
        model.delete_adapter("again")
    model.set_adapter("default")
    model.delete_adapter("again")
    assert list(model.adapters) == ["default", "new"]


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("family", ["llama_untied", "gpt2"])
def test_a_copy_is_the_same_and_another(family, copied):
    model = grounded(family)
    inputs = model.prepare(PROMPTS)
    before = model(**inputs).logits
    other = copied(model)
    assert torch.equal(other(**inputs).logits, before)
    other.adapter.ret_input.add_(1)
    other.adapter.image_projection.bias.add_(1)
    assert torch.equal(model(**inputs).logits, before) and not torch.equal(other(**inputs).logits, before)
    lm = other.unground()
    assert model.frozen_lm.virtual_tokens.attached and lm(torch.tensor([[4]])).logits.shape[-1] == 100
    assert torch.equal(model(**inputs).logits, before)


@torch.no_grad()
def test_two_threads_on_one_model_get_what_each_gets_alone():
    model = grounded("llama_untied")
    index = ImageIndex.build(model, [picture(i) for i in range(4)], ids=list("abcd"))
    prompts = [[f"w{4 + i}", picture(i), "w5", *([picture(i + 9)] if i % 2 else [])] for i in range(4)]
    options = dict(index=index, ret_bias=2.0, max_new_tokens=5, do_sample=False)
    alone = [str(model.generate([prompt], **options)[0]) for prompt in prompts]
    wrong = []

    def work(turn):
        for i in range(12):
            j = (i + turn) % len(prompts)
            if (said := str(model.generate([prompts[j]], **options)[0])) != alone[j]:
                wrong.append((j, said))

    threads = [threading.Thread(target=work, args=(turn,)) for turn in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_gguf_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(GroundingError, match="is no file"):
        ground(str(tmp_path / "none.gguf"), Eye(), image_processor=image_processor)
    assert Path(tmp_path).is_dir()
