"""Whether an answer may have pictures is read where it begins, whatever else happens in `generate`."""

import pytest
import torch

from tests.tiny import FAMILIES, Eye, build, image_processor, picture, tokenizer
from visual_ground import GroundedModel, GroundingConfig, ground
from visual_ground.storage.tensors import WEIGHTS_FILE, read_adapter_config, read_tensors, write_adapter

TEMPLATE = "{% for m in messages %}{{ m['content'] }} </s> {% endfor %}"
WANTED, UNWANTED = ([{"role": "user", "content": text}] for text in ("w4 w5 w6", "w9 w8 w4 w5"))
# As likely as can be, so that only the gate keeps `[RET]` away.
LIKELY = {"ret_bias": 1e3, "max_images": 1, "max_new_tokens": 4}


def grounded(family="llama_untied"):
    settings = GroundingConfig(retrieval_dim=6, retrieval_prompt="")
    return ground(build(family), Eye(), tokenizer(template=TEMPLATE), image_processor, settings).eval()


@torch.no_grad()
def shut_for(model, unwanted, wanted):
    """Fit a gate by hand that is shut for one prompt, and open for the other."""
    states = []
    for prompt in (unwanted, wanted):
        batch = model.prepare([prompt])
        image_tokens = model.active.prompt_image_tokens(batch.get("pixel_values"))
        last = torch.tensor([batch["input_ids"].shape[1] - 1])
        read = model.frozen_lm.hidden_states(batch["input_ids"], batch["attention_mask"], last, (-1,), image_tokens)
        states.append(read[0][0])
    direction = states[1] - states[0]
    weight = 1e6 * direction / direction.square().sum()
    model.adapter.ret_gate_weight.copy_(weight)
    model.adapter.ret_gate_bias.copy_(-weight @ (states[0] + states[1]) / 2)
    return model


def shows(model, prompts, **options):
    return [bool(answer.images) for answer in model.generate(prompts, **{**LIKELY, "do_sample": False, **options})]


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_answer_to_what_wants_a_picture_has_one(family):
    model = grounded(family)
    assert shows(model, [UNWANTED, WANTED]) == [True, True]
    shut_for(model, UNWANTED, WANTED)
    assert shows(model, [UNWANTED, WANTED]) == [False, True]
    assert shows(model, [WANTED, UNWANTED]) == [True, False]


def test_a_picture_in_the_prompt_is_seen_by_the_gate():
    shown = [{"role": "user", "content": [{"type": "image", "image": picture(0)}, {"type": "text", "text": "w5"}]}]
    other = [{"role": "user", "content": [{"type": "image", "image": picture(1)}, {"type": "text", "text": "w5"}]}]
    assert shows(shut_for(grounded(), shown, other), [shown, other]) == [False, True]


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3, "num_return_sequences": 3},
        {"guidance_scale": 1.5},
    ],
    ids=str,
)
def test_every_answer_of_a_prompt_has_its_gate_in_whatever_way_it_is_generated(options):
    model, each = shut_for(grounded(), UNWANTED, WANTED), options.get("num_return_sequences", 1)
    assert shows(model, [UNWANTED, WANTED], **options) == [False] * each + [True] * each


def test_speculative_decoding_and_streams_have_it_too():
    model = shut_for(grounded(), UNWANTED, WANTED)
    for prompt, is_wanted in ((UNWANTED, False), (WANTED, True)):
        assert shows(model, [prompt], prompt_lookup_num_tokens=2) == [is_wanted]
        parts = list(model.stream(prompt, **LIKELY, do_sample=False))
        assert any(not isinstance(part, str) for part in parts) == is_wanted


def test_a_larger_bias_opens_it():
    assert shows(shut_for(grounded(), UNWANTED, WANTED), [UNWANTED], ret_bias=1e6) == [True]


def test_text_that_opens_no_turn_of_a_chat_is_not_asked():
    model = shut_for(grounded(), "w9 w8 w4 w5", "w4 w5 w6")
    assert shows(model, ["w9 w8 w4 w5", "w4 w5 w6"]) == [True, True]


@torch.no_grad()
def test_the_gate_is_saved_and_adapters_of_before_have_none(tmp_path):
    model = shut_for(grounded(), UNWANTED, WANTED)
    model.save_pretrained(tmp_path / "new")
    load = lambda name: GroundedModel.from_pretrained(  # noqa: E731
        build("llama_untied"), tmp_path / name, model.vision, tokenizer(template=TEMPLATE), image_processor
    ).eval()
    assert shows(load("new"), [UNWANTED, WANTED]) == [False, True]
    tensors = read_tensors(tmp_path / "new" / WEIGHTS_FILE, model.adapter.state_dict())
    before = {name: tensor for name, tensor in tensors.items() if not name.startswith("ret_gate")}
    assert len(before) == len(tensors) - 2
    write_adapter(tmp_path / "old", before, read_adapter_config(tmp_path / "new"), "")
    assert shows(load("old"), [UNWANTED, WANTED]) == [True, True]
    model.load_adapter(tmp_path / "old", "old")
    model.set_adapter("old")
    assert not model.adapter.has_ret_gate
