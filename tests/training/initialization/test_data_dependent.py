"""Start values fitted to the training pairs: over the families, and what they promise."""

import pytest
import torch

from tests.tiny import FAMILIES, build, grounded, picture
from visual_ground.training.data.examples import ExampleCollator, ExampleDataset
from visual_ground.training.initialization import data_dependent
from visual_ground.training.initialization.data_dependent import (
    Imitation,
    initialize_from_data,
    layer_at,
    mean_distance,
    target_hidden_states,
)
from visual_ground.training.losses.objective import GroundingObjective
from visual_ground.training.setup import standardise

ROWS = [{"image": picture(i), "caption": f"w{10 + i} w{20 + 2 * i}"} for i in range(12)]


def fitted(family="llama_untied", lm=None, **config):
    model = grounded(family, lm=lm, **config)
    examples = ExampleDataset(ROWS)
    standardise(model, examples)
    initialize_from_data(GroundingObjective(model), examples, ExampleCollator(model, concat_captions_prob=0.0))
    return model


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_start_is_finite_and_leaves_the_lm_alone(family):
    lm = build(family)
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in lm.modules()]
    model = fitted(lm=lm)
    assert all(bool(torch.isfinite(value).all()) for value in model.adapter.state_dict().values())
    assert all(p.grad is None for p in model.parameters())
    model.unground()
    assert all(torch.equal(before[name], value) for name, value in lm.state_dict().items())
    assert [len(module._forward_hooks) for module in lm.modules()] == hooks


@pytest.mark.parametrize("config", [{}, {"text_layers": (-1, 1)}, {"retrieval_dim": 64}], ids=["one", "two", "wide"])
def test_training_pairs_find_each_other_from_the_start(config):
    model = fitted(**config)
    texts = model.embed_text([row["caption"] for row in ROWS])
    images = model.embed_images([row["image"] for row in ROWS])
    right = ((texts @ images.T).argmax(1) == torch.arange(len(ROWS))).float().mean()
    assert right >= 0.5
    assert all(bool(layer.weight.any(-1).all()) for layer in model.adapter.text_retrieval_projection)


@pytest.mark.parametrize("retrieval_prompt", ["", "w90 w91"])
def test_requests_and_captions_start_together(retrieval_prompt):
    model = grounded("llama_untied", retrieval_prompt=retrieval_prompt)
    asked = [{**row, "request": f"w40 {row['caption']}", "group": i} for i, row in enumerate(ROWS)]
    rows = [{**row, "group": i} for i, row in enumerate(ROWS)]
    examples = ExampleDataset([*rows, *asked], groups=[*range(12), *range(12)])
    standardise(model, examples)
    collator = ExampleCollator(model, concat_captions_prob=0.0)
    initialize_from_data(GroundingObjective(model), examples, collator)
    images = model.embed_images([row["image"] for row in ROWS])
    for texts in ([row["caption"] for row in ROWS], [[row["request"], "\n"] for row in asked]):
        right = ((model.embed_text(texts) @ images.T).argmax(1) == torch.arange(len(ROWS))).float().mean()
        assert right >= 0.5


def test_what_cannot_be_fitted_leaves_the_retrieval_layers_as_they_were(caplog):
    model = grounded("llama_untied")
    before = model.adapter.image_retrieval_projection.weight.detach().clone()
    examples = ExampleDataset([ROWS[0]] * 4, groups=[0] * 4)
    standardise(model, examples)
    initialize_from_data(GroundingObjective(model), examples, ExampleCollator(model, concat_captions_prob=0.0))
    assert torch.equal(model.adapter.image_retrieval_projection.weight, before)
    assert "start from random values" in caplog.text and "fewer than two groups" in caplog.text


def test_rows_learn_to_do_what_captions_do():
    model = grounded("llama_untied", num_visual_tokens=2)
    imitation = Imitation(model, layer_at(model, data_dependent.DEPTH))
    features = model.vision(model.vision.preprocess([row["image"] for row in ROWS]))
    pairs = [{"caption": row["caption"], "group": i} for i, row in enumerate(ROWS)]
    wanted = target_hidden_states(imitation, pairs)

    def distance():
        with torch.no_grad():
            return float((imitation.image_states(features) - wanted).square().mean())

    before = distance()
    data_dependent.start_image_tokens(model, pairs, features)
    assert distance() < 0.5 * before


def test_an_image_that_is_far_off_pulls_no_harder_than_others():
    error = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [1.0], [100.0]])
    error[1] = 0
    mean_distance(error.requires_grad_()).backward()
    pulls = error.grad.norm(dim=-1)
    assert torch.allclose(pulls[0], pulls[2], rtol=1e-3) and pulls[1] == 0


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_states_are_those_of_the_layer_after_the_prompt(family):
    model = grounded(family)
    layer = layer_at(model, 0.5)
    short, whole = Imitation(model, layer), Imitation(model, layer)
    whole._keys_values = None
    features = model.vision(model.vision.preprocess([row["image"] for row in ROWS]))
    assert torch.allclose(short.image_states(features), whole.image_states(features), atol=1e-4)
    seen = []
    hook = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(torch.tensor([[*short.prefix, 10, 11, 12]]))
    hook.remove()
    states = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    found = short.text_states([[10, 11, 12], [13]], [[0.5, 1.0, 2.0], [1.0]])
    assert torch.allclose(found[0], torch.tensor([0.5, 1.0, 2.0]) @ states[0, -3:], atol=1e-4)


def test_words_that_all_captions_share_do_not_count():
    model = grounded("llama_untied")
    imitation = Imitation(model, layer_at(model, 0.5))
    pairs = [{"caption": "w10 w11", "group": 7}, {"caption": "w10 w12", "group": 3}, {"caption": "w12", "group": 3}]
    one, other, again = target_hidden_states(imitation, pairs)

    def state(text, at):
        weights = [[float(i == at) + 1e-9 for i in range(len(text))]]
        return imitation.text_states([text], weights)[0]

    ten, eleven, twelve = (model.processor.encode_text(f" w{i}") for i in (10, 11, 12))
    assert torch.allclose(one, state([*ten, *eleven], 1), atol=1e-4)
    assert torch.equal(other, again)
    assert torch.allclose(other, (state([*ten, *twelve], 1) + state(twelve, 0)) / 2, atol=1e-4)


def test_captions_that_are_all_the_same_still_give_a_start():
    model = grounded("llama_untied")
    imitation = Imitation(model, layer_at(model, 0.5))
    pairs = [{"caption": "w10 w11", "group": group} for group in range(3)]
    states = target_hidden_states(imitation, pairs)
    assert bool(torch.isfinite(states).all()) and torch.equal(states[0], states[2])
