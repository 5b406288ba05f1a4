"""The LM alone reads in mixed precision, for as long as the block lasts."""

import pytest
import torch

from tests.tiny import FAMILIES, grounded
from visual_ground.fitting.autocast import autocast_lm

IDS = torch.arange(4, 20)[None]


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_answers_are_near_and_what_is_around_the_lm_stays_exact(family):
    model = grounded(family)
    weights = {name: value.clone() for name, value in model.lm.state_dict().items()}
    exact = model(IDS).logits
    with autocast_lm(model.lm, torch.bfloat16):
        mixed = model(IDS).logits
        assert not torch.is_autocast_enabled("cpu")
    size = exact.isfinite()
    assert not torch.equal(mixed, exact) and torch.equal(mixed.isfinite(), size)
    assert float((mixed - exact)[size].abs().max()) < 0.1 * float(exact[size].abs().max())
    assert torch.equal(model(IDS).logits, exact)
    assert all(torch.equal(weights[name], value) for name, value in model.lm.state_dict().items())


def test_a_run_that_fails_leaves_nothing_behind():
    model = grounded()
    hooks = len(model.lm._forward_pre_hooks)
    with autocast_lm(model.lm, torch.bfloat16), pytest.raises((AttributeError, TypeError, ValueError)):
        model.lm(input_ids="no ids")
    assert not torch.is_autocast_enabled("cpu") and len(model.lm._forward_pre_hooks) == hooks
