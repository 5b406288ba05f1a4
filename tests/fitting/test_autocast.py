"""The LM alone reads in mixed precision, for as long as the block lasts."""

import pytest
import torch

from tests.tiny import FAMILIES, grounded
from visual_ground.fitting import autocast
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


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("room", [2**31, 9000, 0], ids=["all", "some", "none"])
def test_copies_of_weights_change_nothing(family, room, monkeypatch):
    monkeypatch.setattr(autocast, "COPIES_BYTES", room)
    model = grounded(family)
    embeddings = model.lm.get_input_embeddings()(IDS).detach().requires_grad_()

    def logits_and_gradient():
        logits = model.lm(inputs_embeds=embeddings).logits
        return logits, torch.autograd.grad(logits[..., :90].float().square().mean(), embeddings)[0]

    with torch.autocast("cpu", torch.bfloat16):
        wanted = logits_and_gradient()
    with autocast_lm(model.lm, torch.bfloat16):
        for one, other in zip(logits_and_gradient(), wanted, strict=True):
            assert torch.equal(one, other)
        states = torch.ones(1, 2, model.lm.get_output_embeddings().in_features)
        head = model.lm.get_output_embeddings()(states)
    assert torch.equal(head, model.lm.get_output_embeddings()(states)) and head.dtype == torch.float32
    assert all("forward" not in layer.__dict__ for layer in model.lm.modules())


def test_a_run_that_fails_leaves_nothing_behind():
    model = grounded()
    hooks = len(model.lm._forward_pre_hooks)
    with autocast_lm(model.lm, torch.bfloat16), pytest.raises((AttributeError, TypeError, ValueError)):
        model.lm(input_ids="no ids")
    assert not torch.is_autocast_enabled("cpu") and len(model.lm._forward_pre_hooks) == hooks


def test_copies_that_find_no_memory_leave_nothing_behind(monkeypatch):
    model, made = grounded(), []

    def third_fails(layer, dtype):
        if len(made) == 2:
            raise MemoryError
        made.append(layer)
        return layer.forward

    monkeypatch.setattr(autocast, "_with_copies", third_fails)
    hooks = len(model.lm._forward_pre_hooks)
    with pytest.raises(MemoryError), autocast_lm(model.lm, torch.bfloat16):
        pass
    assert all("forward" not in layer.__dict__ for layer in model.lm.modules())
    assert len(model.lm._forward_pre_hooks) == hooks
