import pytest
import torch

from visual_ground.regression import PENALTIES, LinearMap, ridge


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_ridge_finds_a_linear_map_and_its_bias():
    inputs, weight, bias = numbers(200, 5), numbers(3, 5, seed=1), numbers(3, seed=2)
    found = ridge(inputs, inputs @ weight.T + bias)
    assert torch.allclose(found(inputs), inputs @ weight.T + bias, atol=0.1)


def test_ridge_trusts_inputs_that_tell_nothing_less_than_those_that_tell():
    inputs = numbers(60, 40)
    told, noise = ridge(inputs, 3 * inputs[:, :2]), ridge(inputs, numbers(60, 2, seed=3))
    assert noise.weight.norm() < told.weight.norm() / 5


def test_rows_of_one_group_do_not_vouch_for_each_other():
    # 30 groups of 10 near copies, with targets at random: by rows it looks learnable, by groups it is not.
    groups = torch.arange(30).repeat_interleave(10)
    inputs = numbers(30, 50)[groups] + 0.01 * numbers(300, 50, seed=1)
    targets = numbers(30, 1, seed=2)[groups]
    assert ridge(inputs, targets, groups).weight.norm() < ridge(inputs, targets).weight.norm() / 2


@pytest.mark.parametrize("rows", [4, 40], ids=["fewer rows than columns", "more"])
def test_the_gradient_of_the_penalised_loss_is_zero(rows):
    inputs, targets = numbers(rows, 12).double() + 3, numbers(rows, 4, seed=1).double() - 2
    found = ridge(inputs, targets, torch.zeros(rows))  # With one group nothing is held out: the smallest penalty.
    weight, bias = found.weight.requires_grad_(), found.bias.requires_grad_()
    loss = (inputs @ weight.T + bias - targets).square().sum() + PENALTIES[0] * rows * weight.square().sum()
    loss.backward()
    assert float(weight.grad.abs().max()) < 1e-9 and float(bias.grad.abs().max()) < 1e-9


@pytest.mark.parametrize(("sign", "chosen"), [(1, max(PENALTIES)), (-1, min(PENALTIES))])
def test_a_score_chooses_the_penalty_on_whole_groups_held_out(sign, chosen):
    inputs, targets, groups, asked = numbers(30, 8), numbers(30, 3, seed=1), torch.arange(30) // 2, []

    def score(fitted, held):
        asked.append(held)
        return -sign * float(fitted.weight.norm())

    found = ridge(inputs, targets, groups, score)
    own = inputs - inputs.mean(0)
    exact = torch.linalg.solve(own.T @ own + chosen * 30 * torch.eye(8), own.T @ (targets - targets.mean(0))).T
    assert torch.allclose(found.weight, exact, atol=1e-5)
    assert all(torch.equal(held, groups % 5 == 4) for held in asked) and len(asked) == len(PENALTIES)


def test_a_map_after_scaling_reads_inputs_as_they_are():
    inputs, middle, spread = numbers(9, 4), numbers(4, seed=1), numbers(4, seed=2).exp()
    scaled = LinearMap(numbers(2, 4, seed=3), numbers(2, seed=4))
    assert torch.allclose(scaled.unstandardize(middle, spread)(inputs), scaled((inputs - middle) / spread), atol=1e-5)
