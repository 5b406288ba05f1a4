import pytest
import torch

from visual_ground.ridge import Ridge, fit_ridge


@pytest.mark.parametrize("rows", [5, 40], ids=["fewer rows than columns", "more"])
def test_the_gradient_of_the_penalised_loss_is_zero(rows):
    torch.manual_seed(0)
    inputs, targets, penalty = torch.randn(rows, 12).double() + 3, torch.randn(rows, 4) - 2, 0.1
    fitted = Ridge(inputs, targets).solve(penalty)
    x = inputs - inputs.mean(0)
    strength = penalty * float(x.square().sum()) / min(rows, 12)
    weight, bias = fitted.weight.double().requires_grad_(), fitted.bias.double().requires_grad_()
    loss = (inputs @ weight.T + bias - targets).square().sum() + strength * weight.square().sum()
    loss.backward()
    assert float(weight.grad.abs().max()) < 1e-3 and float(bias.grad.abs().max()) < 1e-3


def test_the_penalty_is_chosen_on_rows_held_out_by_group():
    torch.manual_seed(0)
    inputs = torch.randn(30, 8)
    groups = torch.arange(30) // 2
    noise = fit_ridge(
        inputs,
        torch.randn(30, 3),
        groups,
        lambda layer, held: -float(layer.weight.square().sum()) * int(held.sum()),
        (1e-3, 1.0),
    )
    assert torch.allclose(noise.weight, Ridge(inputs, noise(inputs)).solve(1e-9).weight, atol=1e-2)
    masks = []
    fit_ridge(inputs, inputs, groups, lambda layer, held: masks.append(held) or 0.0, (1.0,))
    assert torch.equal(torch.stack(masks).sum(0), torch.ones(30, dtype=torch.long))
    assert all(len(held.view(-1, 2).float().mean(1).unique()) == 2 for held in masks)
    assert all(bool((held.view(-1, 2)[:, 0] == held.view(-1, 2)[:, 1]).all()) for held in masks)


def test_one_group_is_fitted_with_the_largest_penalty():
    fitted = fit_ridge(torch.eye(3), torch.eye(3), torch.zeros(3), lambda layer, held: 0.0, (1e-3, 1.0))
    assert torch.equal(fitted.weight, Ridge(torch.eye(3), torch.eye(3)).solve(1.0).weight)
