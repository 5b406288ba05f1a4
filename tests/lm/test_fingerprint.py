"""An adapter is told, once, that it meets another LM than its own; dtypes, names and copies are no other LM."""

import copy
import json
import logging

import pytest
import torch

from tests.tiny import FAMILIES, Eye, build, grounded, image_processor, tokenizer
from visual_ground import GroundedModel
from visual_ground.lm.base.fingerprint import Fingerprint, _warn_once
from visual_ground.lm.base.spec import read_spec
from visual_ground.storage.tensors import CONFIG_FILE


@pytest.fixture(autouse=True)
def untold(caplog):
    _warn_once.cache_clear()
    caplog.set_level(logging.WARNING, "visual_ground")


def fingerprint(lm, words=None):
    return read_spec(lm, words or tokenizer(), (-1,)).fingerprint


def changed(lm, only, by):
    """Return a copy of an LM in which the weights whose names have `only` in them moved."""
    other = copy.deepcopy(lm)
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if only in name:
                weight.add_(by * weight.abs().mean() * torch.randn_like(weight))
    return other


def told(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("visual_ground")]


def load(lm, folder, words=None):
    return GroundedModel.from_pretrained(lm, folder, Eye(), words or tokenizer(), image_processor)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_copy_in_any_dtype_and_mode_is_the_same_lm(family):
    one = fingerprint(build(family))
    assert one == fingerprint(build(family))
    assert not one.differences(fingerprint(build(family).to(torch.bfloat16)))
    assert not one.differences(fingerprint(build(family).train()))
    assert Fingerprint(**{**one.to_dict(), "rows": one.rows, "state": one.state}) == one


def test_the_same_lm_is_loaded_in_silence_and_another_is_named_once(tmp_path, caplog):
    lm = build("llama_untied")
    grounded(lm=lm).save_pretrained(tmp_path)
    load(build("llama_untied"), tmp_path).unground()
    load(build("llama_untied").to(torch.bfloat16), tmp_path).unground()
    assert not told(caplog)
    for part, words in [("embed_tokens", "embedding rows differ"), ("v_proj", "hidden state"), ("mlp", "hidden state")]:
        before = len(told(caplog))
        other = changed(build("llama_untied"), part, 1.0)
        for _ in range(2):
            load(other, tmp_path).unground()
        assert len(told(caplog)) == before + 1 and words in told(caplog)[-1]
    assert "rows" not in told(caplog)[-1].split(":")[1]


def test_another_vocabulary_is_named(tmp_path, caplog):
    grounded("llama_untied").save_pretrained(tmp_path)
    words = tokenizer()
    words.add_tokens(["w100"])
    load(build("llama_untied", vocab_size=101), tmp_path, words)
    assert "101 tokens here, 100 in training" in told(caplog)[0]


def test_an_adapter_keeps_its_own_lm_s_fingerprint_until_it_is_trained(tmp_path):
    grounded("llama_untied").save_pretrained(tmp_path / "one")
    model = load(changed(build("llama_untied"), "mlp", 1.0), tmp_path / "one")
    model.save_pretrained(tmp_path / "two")
    one, two = ((tmp_path / name / CONFIG_FILE).read_bytes() for name in ("one", "two"))
    assert one == two
    model.active.record_training({"max_steps": 3})
    model.save_pretrained(tmp_path / "three")
    three = json.loads((tmp_path / "three" / CONFIG_FILE).read_text())
    assert three["fingerprint"] != json.loads(one)["fingerprint"] and three["report"]["training"] == {"max_steps": 3}
