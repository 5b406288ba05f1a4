"""Training that cannot harm: the result is the best state on held-out groups, and never worse than the start."""

import json
import logging

import pytest
import torch

from tests.tiny import grounded, picture
from tests.training.runs import arguments
from visual_ground import GroundedModel, GroundingTrainer
from visual_ground.errors import GroundingValueError
from visual_ground.evaluation.metrics import mean_reciprocal_ranks
from visual_ground.training.selection.best_state import STATE_FILE, Part
from visual_ground.training.selection.held_out import MAX_EXAMPLES

# Two rows of each group.
ROWS = [{"image": picture(i), "caption": f"w{10 + i // 2} w{50 + i % 40}", "group": i // 2} for i in range(60)]


def trained(folder, rate, steps=10, rows=ROWS, model=None, **changes):
    torch.manual_seed(0)
    rates = dict(learning_rate=rate, retrieval_learning_rate=rate)
    args = arguments(folder, held_out=0.4, max_steps=steps, **rates, **changes)
    trainer = GroundingTrainer(grounded(retrieval_prompt="w90 w91") if model is None else model, args, rows)
    trainer.train(resume_from_checkpoint=True)
    return trainer


def scores_of(trainer):
    """Return what was scored, one dictionary after another; the first is the start's."""
    found = [entry for entry in trainer.state.log_history if "held_out_retrieval" in entry]
    return [(entry["held_out_retrieval"], entry["held_out_captioning"]) for entry in found]


def now(trainer):
    scores = trainer._best.held_out.scores()
    return round(scores["retrieval"], 4), round(scores["captioning"], 4)


def test_an_absurd_learning_rate_leaves_the_start_and_ends_soon(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = trained(tmp_path, 10.0, patience=3)
    start, *others = scores_of(trainer)
    assert trainer.state.global_step < trainer.state.max_steps and all(other[1] < start[1] for other in others)
    # `[RET]` belongs to retrieval, and is a column of every softmax.
    assert now(trainer)[0] >= start[0] and now(trainer)[1] == pytest.approx(start[1], abs=0.01)
    assert "as at the start" in caplog.text


@pytest.mark.parametrize("prompted", [False, True], ids=["captions", "prompts"])
def test_the_result_is_the_best_state_that_was_scored(prompted, tmp_path):
    rows = [{**row, "prompt": [picture(99), row["caption"]]} for row in ROWS] if prompted else ROWS
    trainer = trained(tmp_path, 1e-3, rows=rows)
    found, best = scores_of(trainer), now(trainer)
    assert len(trainer._best.parts) == (1 if prompted else 2)
    if prompted:  # Image tokens and retrieval depend on each other, and neither may become worse.
        assert best in found and best[0] >= found[0][0] and best[1] >= found[0][1]
    else:
        assert best == (max(one for one, _ in found), max(one for _, one in found))


def test_a_run_that_is_killed_and_goes_on_keeps_the_same_state(tmp_path):
    options = dict(save_strategy="steps", save_steps=2)
    whole = trained(tmp_path / "whole", 1e-2, **options)

    class Killed(Exception):
        pass

    def killed(*args, **event):
        raise Killed

    torch.manual_seed(0)
    rates = dict(learning_rate=1e-2, retrieval_learning_rate=1e-2)
    args = arguments(tmp_path / "killed", held_out=0.4, max_steps=10, **rates, **options)
    first = GroundingTrainer(grounded(retrieval_prompt="w90 w91"), args, ROWS)
    first._publisher.push_checkpoint = killed  # After the first checkpoint.
    with pytest.raises(Killed):
        first.train()
    again = trained(tmp_path / "killed", 1e-2, **options)
    assert again.state.global_step == whole.state.global_step
    kept, wanted = again.grounded.adapter.state_dict(), whole.grounded.adapter.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in wanted.items())
    # A run that has ended is not trained further, and still gives its best state.
    ended = trained(tmp_path / "whole", 1e-2, **options).grounded.adapter.state_dict()
    assert all(torch.equal(ended[name], value) for name, value in wanted.items())
    checkpoint = max((tmp_path / "whole").glob("checkpoint-*"), key=lambda path: path.stat().st_mtime_ns)
    assert {"parts", "waited"} == set(json.loads((checkpoint / STATE_FILE).read_text()))


def test_groups_are_held_out_whole_or_not_at_all(tmp_path):
    trainer = GroundingTrainer(grounded(), arguments(tmp_path, held_out=0.4), ROWS)
    held = {example["row"] for example in trainer._best.held_out.examples}
    trained_on = {trainer.train_dataset[i]["row"] for i in range(len(trainer.train_dataset))}
    assert len(held) == 24 <= MAX_EXAMPLES and held | trained_on == set(range(60)) and not held & trained_on
    assert {ROWS[i]["group"] for i in held}.isdisjoint({ROWS[i]["group"] for i in trained_on})
    # Too few groups say nothing, and "fromage" is the published recipe.
    few, published = arguments(tmp_path, held_out=0.3), arguments(tmp_path, held_out=0.4)
    assert len(GroundingTrainer(grounded(), few, ROWS).train_dataset) == 60
    assert len(GroundingTrainer(grounded(scaling="none"), published, ROWS).train_dataset) == 60
    assert len(GroundingTrainer(grounded(), arguments(tmp_path, held_out=0.0), ROWS).train_dataset) == 60


def test_retrieval_layers_have_a_gentle_rate_where_they_start_from_a_fit(tmp_path):
    for model, rate in ((grounded(), 3e-5), (grounded(scaling="none"), 1e-2)):
        optimizer = GroundingTrainer(model, arguments(tmp_path), ROWS).create_optimizer()
        of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert len(of) == len(list(model.adapter.parameters()))
        assert of[id(model.adapter.image_retrieval_projection.weight)] == rate
        assert of[id(model.adapter.image_projection.weight)] == 1e-2


def test_a_state_is_better_where_no_score_is_worse_and_none_is_no_number():
    tensor = torch.zeros(1)
    part = Part({"x": tensor}, ("a", "b"))
    offered = [(1.0, 1.0), (2.0, 0.5), (1.0, 1.0), (1.0, 2.0), (float("nan"), 3.0), (1.5, 2.0)]
    taken = []
    for step, (a, b) in enumerate(offered):
        tensor.fill_(step)
        taken.append(part.offer({"a": a, "b": b}, step))
    assert taken == [True, False, False, True, False, True]
    part.restore()
    assert tensor.item() == part.step == 5


def test_reciprocal_ranks_count_each_image_once():
    texts = torch.eye(3)[[0, 0, 1, 2]]
    images = torch.eye(3)[[0, 0, 2, 1]]
    ranks = mean_reciprocal_ranks(texts, images, torch.tensor([0, 0, 1, 2]))
    assert ranks["text_to_image"] == pytest.approx((1 + 1 + 1 / 3 + 1 / 3) / 4, abs=0.2)
    perfect = mean_reciprocal_ranks(texts, texts, torch.tensor([0, 0, 1, 2]))
    assert perfect == {"text_to_image": 1.0, "image_to_text": 1.0}


@pytest.mark.parametrize("settings", [{"held_out": 1.0}, {"held_out": -0.1}, {"patience": 0}])
def test_settings_outside_their_range_are_named(settings, tmp_path):
    with pytest.raises(GroundingValueError, match=next(iter(settings))):
        arguments(tmp_path, **settings)


def test_a_loaded_adapter_is_not_made_worse_either(tmp_path):
    trained(tmp_path / "one", 1e-3, steps=2).grounded.save_pretrained(tmp_path / "adapter")
    other = grounded(retrieval_prompt="w90 w91")
    loaded = GroundedModel.from_pretrained(
        other.unground(), tmp_path / "adapter", other.vision, other.tokenizer, is_trainable=True
    )
    trainer = trained(tmp_path / "two", 10.0, model=loaded)
    assert now(trainer) >= scores_of(trainer)[0]
