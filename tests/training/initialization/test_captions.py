"""The last start values: image tokens after which the LM goes on with captions."""

import pytest
import torch

from tests.tiny import grounded, picture
from visual_ground.evaluation.pairs import image_features
from visual_ground.training.data.examples import ExampleCollator, ExampleDataset
from visual_ground.training.initialization.captions import start_captions
from visual_ground.training.losses.captioning import captioning_loss
from visual_ground.training.losses.compute_plan import choose_compute_plan
from visual_ground.training.losses.objective import GroundingObjective

ROWS = [{"image": picture(i), "caption": f"w{10 + i} w20 w21"} for i in range(8)]
ASKED = [{**row, "question": "w30 w31"} for row in ROWS]


@pytest.mark.parametrize("family", ["llama_untied", "gemma2_scaled_capped", "mamba"])
@pytest.mark.parametrize("config", [{}, {"num_visual_tokens": 2}], ids=["one token", "two"])
def test_captions_become_likelier_and_only_image_tokens_move(family, config):
    model = grounded(family, **config)
    rows = ExampleDataset([*ROWS, *ASKED])
    examples = [rows[i] for i in range(len(rows))]
    features, collator = image_features(model, examples), ExampleCollator(model, concat_captions_prob=0.0)
    sequences = collator(examples)["captioning"]
    objective = GroundingObjective(model, plan=choose_compute_plan(model, sequences, None))
    before = {name: value.detach().clone() for name, value in model.adapter.state_dict().items()}
    losses = [captioning_loss(model, sequences, features).item()]
    start_captions(objective, examples, features, collator)
    losses.append(captioning_loss(model, sequences, features).item())
    assert losses[1] < losses[0] - 1e-3
    after = {name: value.clone() for name, value in model.adapter.state_dict().items()}
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == {"image_projection.bias", "image_projection.weight"}
    assert all(p.grad is None for p in model.parameters())
    model.adapter.load_state_dict(before)
    start_captions(objective, examples, features, collator)
    assert all(torch.equal(value, after[name]) for name, value in model.adapter.state_dict().items())


def test_weights_change_only_by_what_the_retrieval_space_reads():
    model = grounded("llama_untied", retrieval_dim=3)
    rows = ExampleDataset(ROWS)
    examples = [rows[i] for i in range(len(rows))]
    before = model.adapter.image_projection.weight.detach().clone()
    collator = ExampleCollator(model, concat_captions_prob=0.0)
    start_captions(GroundingObjective(model), examples, image_features(model, examples), collator)
    change = model.adapter.image_projection.weight.detach() - before
    read = model.adapter.image_retrieval_projection.weight.detach()
    assert int(torch.linalg.matrix_rank(change, rtol=1e-4)) == 3
    assert int(torch.linalg.matrix_rank(torch.cat([change, read]), rtol=1e-4)) == 3
