"""Which short ways are taken: rounding does not keep one out, and a wrong one is never taken."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import Eye, build, image_processor, tokenizer
from tests.training.losses.test_objective import TAKEN, batch_of
from visual_ground import GroundingConfig, ground
from visual_ground.training.losses.compute_plan import _agree, choose_compute_plan
from visual_ground.training.speedups import packing

DTYPES = (torch.float32, torch.bfloat16)


def model_of(family, dtype):
    config = GroundingConfig(retrieval_dim=6, caption_prompt="w7", image_prompt="w8 w9 w10 w7 {image} w11")
    return ground(build(family).to(dtype), Eye(), tokenizer(), image_processor, config)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", TAKEN)
def test_the_same_ways_are_taken_in_every_type(family, dtype):
    model = model_of(family, dtype)
    plan = choose_compute_plan(model, batch_of(model)["captioning"])
    taken = {name for name in ("packed", "direct_head", "shared_prefix") if getattr(plan, name)}
    assert taken == TAKEN[family] - {"prefixes"}


@given(st.integers(0, 99), st.sampled_from([0.0, 0.02, 0.1, 0.45, 1.0]))
def test_what_bfloat16_rounds_is_no_other_gradient_and_a_wrong_mask_is(seed, part):
    draw = torch.Generator().manual_seed(seed)
    gradient, change = torch.randn(2, 40, 30, generator=draw)
    changed = gradient + part * change * gradient.norm() / change.norm()
    assert _agree([gradient], [changed], torch.bfloat16) == (part <= 0.1)
    assert _agree([gradient], [changed], torch.float32) == (part == 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama_untied", "gpt2"])
def test_sequences_that_see_each_other_are_never_packed(family, dtype, monkeypatch):
    def sees_all(owner, prefix, dtype):
        seen = torch.ones(len(owner), owner.shape[1], owner.shape[1], dtype=torch.bool).tril()
        return packing.additive_mask(torch.nn.functional.pad(seen, (prefix, 0), value=True)[:, None], dtype)

    monkeypatch.setattr(packing, "_block_mask", sees_all)
    model = model_of(family, dtype)
    plan = choose_compute_plan(model, batch_of(model)["captioning"])
    assert not plan.packed and plan.direct_head and plan.shared_prefix
