import torch

from visual_ground.closed_form import ridge, shared_space


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


def test_pairs_meet_in_the_shared_space_and_its_missing_dimensions_are_zero():
    hidden = numbers(300, 4)
    texts = hidden @ numbers(4, 6, seed=1) + 0.1 * numbers(300, 6, seed=2)
    images = hidden @ numbers(4, 20, seed=3) + 0.1 * numbers(300, 20, seed=4)
    text, image = shared_space(texts[:200], images[:200], width=8)
    assert not text.weight[6:].any() and not image.weight[6:].any()
    unit = [torch.nn.functional.normalize(found, dim=-1) for found in (text(texts[200:]), image(images[200:]))]
    assert float(((unit[0] @ unit[1].T).argmax(1) == torch.arange(100)).float().mean()) > 0.8
