"""Law f over the families, and what the trainer promises: resume, evaluation, good errors, nothing half-done."""

import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
from transformers import EarlyStoppingCallback

from tests.tiny import FAMILIES, build, grounded, tokenizer
from tests.training.runs import ROWS, TEMPLATE, arguments, examples
from visual_ground import GroundedModel, GroundingError, GroundingTrainer
from visual_ground.errors import GroundingStateError, GroundingTypeError, GroundingValueError
from visual_ground.evaluation import CaptionPairEvaluator, EvaluationPairs, RetrievalEvaluator
from visual_ground.training.data.examples import ExampleCollator, ExampleDataset
from visual_ground.training.losses.cached_retrieval import PrefixCache
from visual_ground.training.losses.compute_plan import choose_prefix_cache
from visual_ground.training.losses.contrastive import contrast
from visual_ground.training.losses.objective import GroundingLoss, GroundingObjective
from visual_ground.training.losses.retrieval import plain_retrieval
from visual_ground.training.saving.checkpoints import complete_checkpoints

# Features are the vectors, and the temperature is 1.
PLAIN = SimpleNamespace(embed_images=lambda features: features, logit_scale=torch.tensor(0.0))


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    return request.param


@pytest.mark.parametrize("num_tokens", [100, 95], ids=["appended", "spare"])
def test_law_f_only_the_adapter_changes(family, num_tokens, tmp_path):
    lm = build(family)
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    model = grounded(lm=lm, num_tokens=num_tokens)
    adapter = {name: value.detach().clone() for name, value in model.adapter.named_parameters()}
    trainer = GroundingTrainer(model, arguments(tmp_path), ROWS)
    trainer.train()
    assert all(torch.equal(before[name], value) for name, value in lm.state_dict().items())
    assert model.active.report.training["max_steps"] == 3 and model.active.report.training["pairs"] == len(ROWS)
    assert all(p.grad is None for p in lm.parameters())
    same = [name for name, value in model.adapter.named_parameters() if torch.equal(adapter[name], value)]
    assert not same
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(map(math.isfinite, history)) and len(history) == 3
    norms = [row.detach().norm() for row in model.adapter.ret_embeddings()]
    assert torch.allclose(torch.stack(norms), model.adapter.ret_norms, rtol=1e-4)


def test_a_small_set_is_learnt(tmp_path):
    model = grounded("llama_untied")
    args = arguments(tmp_path, max_steps=60, per_device_train_batch_size=12, concat_captions_prob=0.0)
    trainer = GroundingTrainer(model, args, ROWS, ROWS)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] - 1
    assert after["eval_text_to_image_r1"] > 80
    assert after["eval_ret_rate"] == 1 > before["eval_ret_rate"]
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    wanted = {"captioning", "text_retrieval", "text_to_image", "image_to_text", "temperature", "grad_norm", "memory_mb"}
    wanted |= {"text_to_image_accuracy", "image_to_text_accuracy", "tokens_per_second", "images_per_second"}
    assert wanted | {"ret_input_norm", "ret_output_norm", "adapter_norm"} <= set(steps[-1])
    assert all(math.isfinite(value) and value >= 0 for value in map(steps[-1].get, wanted))
    assert [path.name for path in sorted((tmp_path / "pictures").iterdir())] == [
        "eval-00000000.png",
        "eval-00000060.png",
    ]
    assert any((tmp_path / "logs").iterdir())


@pytest.mark.parametrize("prompted", [False, True], ids=["plain", "chat"])
def test_prefixes_give_what_the_plain_computation_gives(family, prompted):
    model = grounded(family, text_layers=(-1, 1))
    if prompted:
        model.processor.tokenizer.chat_template = TEMPLATE
    rows = [dict(row, **({"request": "w5 w6"} if prompted and i % 2 else {})) for i, row in enumerate(ROWS)]
    batch = examples(model, rows)["retrieval"]
    store = choose_prefix_cache(model, batch, 2**20)
    if family in ("mamba", "gemma2_scaled_capped"):
        assert store is None
        return
    assert isinstance(store, PrefixCache)
    for _ in range(2):
        model.adapter.zero_grad()
        plain, quick = plain_retrieval(model, batch), store.run(batch)
        assert torch.allclose(plain.loss, quick.loss, atol=1e-4)
        assert torch.allclose(plain.vectors, quick.vectors, atol=1e-4)
        gradients = []
        for result in (plain, quick):
            model.adapter.zero_grad()
            (result.loss + (result.vectors * torch.arange(6.0)).sum()).backward()
            gradients.append({n: p.grad.clone() for n, p in model.adapter.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            assert torch.allclose(gradient, gradients[1][name], rtol=1e-3, atol=1e-4), name
    assert 0 < store.held_bytes <= 2**20


def test_untrained_zero_vectors_cost_log_batch():
    found = contrast(PLAIN, torch.zeros(7, 3), torch.zeros(7, 3), torch.arange(7))
    assert found.text_to_image == pytest.approx(math.log(7)) and found.image_to_text == pytest.approx(math.log(7))


def test_pairs_of_one_group_are_no_negatives():
    scores = torch.tensor([[1.0, 9.0, 0.0], [9.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    apart = contrast(PLAIN, scores, torch.eye(3), torch.tensor([0, 0, 1])).text_to_image
    wanted = torch.stack(
        [-torch.log_softmax(torch.tensor(row), 0)[0] for row in ([1.0, 0.0], [1.0, 0.0], [1.0, 0.0, 0.0])]
    )
    assert torch.allclose(apart, wanted.mean())
    dataset = ExampleDataset(ROWS, groups=[0] * len(ROWS))
    assert dataset[3]["group"] == 0


def test_questions_and_requests_go_through_the_chat_template():
    model = grounded("llama_untied", bos=False)
    model.processor.tokenizer.chat_template = TEMPLATE
    collator = ExampleCollator(model)
    example = {"caption": "w10 w11", "question": "w5", "request": "w6"}
    captioning, retrieval = collator.captioning(example), collator.retrieval(example)
    assert captioning.ids == (50, -1, 5, 51, 52, 10, 11, 2)[: len(captioning.ids)] or captioning.ids[-3:] == (10, 11, 2)
    assert [i for i in captioning.labels if i != -100] == [10, 11, 2]
    assert retrieval.ids == (50, 6, 51, 52, 100) and retrieval.labels == (-100,) * 4 + (100,)
    model.processor.tokenizer.chat_template = None
    assert collator.retrieval(example).ids[0] == 6 and collator.retrieval(example).ids[-1] == 100


def test_resuming_equals_never_stopping(tmp_path):
    def run(folder, **options):
        torch.manual_seed(0)
        model = grounded("qwen2_tied")
        trainer = GroundingTrainer(model, arguments(folder, max_steps=4, save_strategy="steps", save_steps=2), ROWS)
        trainer.train(**options)
        return model.adapter.state_dict()

    whole = run(tmp_path)
    files = set(os.listdir(tmp_path / "checkpoint-2"))
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "optimizer.pt"} <= files
    assert "model.safetensors" not in files
    assert sum(p.stat().st_size for p in (tmp_path / "checkpoint-2").iterdir()) < 200_000
    again = run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    loaded = GroundedModel.from_pretrained(
        build("qwen2_tied"), tmp_path / "checkpoint-4", grounded().vision, tokenizer(), is_trainable=True
    )
    GroundingTrainer(loaded, arguments(tmp_path / "more"), ROWS).train()


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", eval_strategy="steps", save_steps=1, eval_steps=1)
    args.load_best_model_at_end, args.metric_for_best_model = True, "eval_loss"
    args.greater_is_better = True
    trainer = GroundingTrainer(grounded(), args, ROWS, ROWS)
    trainer.train()
    best = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["best_model_checkpoint"]
    again = GroundedModel.from_pretrained(build("llama_untied"), best, trainer.grounded.vision, tokenizer())
    own = trainer.grounded.adapter.state_dict()
    assert all(torch.equal(own[name], value) for name, value in again.adapter.state_dict().items())


def test_a_loss_that_is_not_finite_stops_before_the_adapter(tmp_path):
    model = grounded()
    trainer = GroundingTrainer(model, arguments(tmp_path, max_steps=50, save_strategy="steps", save_steps=1), ROWS)
    objective, calls = trainer.model.forward, []

    def poisoned(**inputs):
        calls.append({name: value.detach().clone() for name, value in model.adapter.named_parameters()})
        losses = objective(**inputs)
        return losses if len(calls) < 3 else type(losses)(**{**losses, "loss": losses.loss * float("nan")})

    trainer.model.forward = poisoned
    with pytest.raises(GroundingValueError, match=r"nan at step 2, in the batch of examples \["):
        trainer.train()
    assert all(torch.equal(calls[-1][name], value) for name, value in model.adapter.named_parameters())
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()


def test_a_gradient_that_is_not_finite_stops_too(tmp_path):
    model = grounded()
    trainer = GroundingTrainer(model, arguments(tmp_path), ROWS)
    model.adapter.logit_scale.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(GroundingValueError, match="gradient is not finite at step 0"):
        trainer.train()


def test_bad_datasets_and_models_are_named(tmp_path):
    model, args = grounded(), arguments(tmp_path)
    for rows, match in [
        ([], "empty"),
        ([{"picture": 1, "text": "w4"}], r"\['image', 'caption'\].*\['picture', 'text'\]"),
        (3, "int"),
    ]:
        with pytest.raises(GroundingError, match=match):
            GroundingTrainer(model, args, rows)
    with pytest.raises(GroundingTypeError, match="Linear"):
        GroundingTrainer(torch.nn.Linear(2, 2), args, ROWS)
    for caption, match in [("", "All captions.*empty"), (None, "All captions.*empty"), (7, "Row 0.*7.*int")]:
        with pytest.raises(GroundingError, match=match):
            GroundingTrainer(model, args, [dict(row, caption=caption) for row in ROWS])
    for rows, batch, match in [(ROWS, 1, "batch of one"), (ROWS[:3], 4, "3 usable rows.*takes 4")]:
        with pytest.raises(GroundingValueError, match=match):
            GroundingTrainer(model, arguments(tmp_path, per_device_train_batch_size=batch), rows)
    model.adapter.requires_grad_(False)
    with pytest.raises(GroundingStateError, match="is_trainable"):
        GroundingTrainer(model, args, ROWS)
    with pytest.raises(GroundingValueError, match="captioning_fraction"):
        arguments(tmp_path, captioning_fraction=0.0)


def test_pixels_and_cached_features_cost_the_same(tmp_path):
    model = grounded()
    batch = examples(model)
    objective = GroundingObjective(model)
    features = model.vision(batch.pop("pixel_values"))
    pixels = objective(**examples(model))
    assert torch.allclose(objective(**batch, image_features=features).loss, pixels.loss)


class Scores:
    """An evaluator that gives the next of these scores at each evaluation."""

    name, primary_metric = "quality", "score"

    def __init__(self, *scores):
        self.scores = list(scores)

    def __call__(self, model):
        assert not model.adapter.training
        return {"score": self.scores.pop(0), "other": 0.0}


def evaluated_arguments(tmp_path, **changes):
    strategies = dict(save_strategy="steps", eval_strategy="steps", save_steps=1, eval_steps=1)
    return arguments(tmp_path, **{**strategies, "load_best_model_at_end": True, **changes})


@pytest.mark.parametrize("metric", ["quality", "eval_quality_score"])
@pytest.mark.parametrize("eval_dataset", [None, ROWS], ids=["alone", "beside"])
def test_the_best_checkpoint_by_an_evaluator_is_kept_and_loaded(tmp_path, eval_dataset, metric):
    args = evaluated_arguments(tmp_path, metric_for_best_model=metric, max_steps=4, save_total_limit=1)
    trainer = GroundingTrainer(grounded(), args, ROWS, eval_dataset, evaluator=Scores(1.0, 5.0, 3.0, 2.0))
    trainer.train()
    assert trainer.state.best_metric == 5.0 and trainer.state.best_global_step == 2
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-2"]
    again = GroundedModel.from_pretrained(
        build("llama_untied"), tmp_path / "checkpoint-2", trainer.grounded.vision, tokenizer()
    )
    trained = trainer.grounded.adapter.state_dict()
    assert all(torch.equal(trained[name], value) for name, value in again.adapter.state_dict().items())
    evaluations = [entry for entry in trainer.state.log_history if "eval_quality" in entry]
    assert [entry["eval_quality_score"] for entry in evaluations] == [1.0, 5.0, 3.0, 2.0]
    assert all(("eval_loss" in entry) == (eval_dataset is not None) for entry in evaluations)


def test_early_stopping_looks_at_an_evaluator(tmp_path):
    args = evaluated_arguments(tmp_path, metric_for_best_model="quality", max_steps=9)
    stopping = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = GroundingTrainer(grounded(), args, ROWS, evaluator=Scores(*[2.0, 1.0, 0.0, 9.0]), callbacks=[stopping])
    trainer.train()
    assert trainer.state.global_step == 3


def test_several_evaluators_and_a_dataset_report_together(tmp_path):
    model = grounded()
    pairs = EvaluationPairs(ROWS)
    evaluators = [RetrievalEvaluator(pairs), CaptionPairEvaluator(pairs), RetrievalEvaluator(ROWS[:4], name="few")]
    metrics = GroundingTrainer(model, arguments(tmp_path), ROWS, ROWS, evaluators).evaluate()
    for name in ("text_to_image_r1", "image_to_text_r10"):
        assert metrics[f"eval_retrieval_{name}"] == metrics[f"eval_{name}"]
    assert metrics["eval_few"] == metrics["eval_few_text_to_image_r1"]
    assert metrics["eval_captions"] == metrics["eval_captions_caption_pair_accuracy"] and "eval_loss" in metrics
    with pytest.raises(GroundingTypeError, match="got int"):
        GroundingTrainer(model, arguments(tmp_path), ROWS, evaluator=3)
    with pytest.raises(GroundingValueError, match="nothing to evaluate on"):
        GroundingTrainer(model, arguments(tmp_path), ROWS).evaluate()


def test_a_loss_of_ones_own(tmp_path):
    def only_captioning(objective, batch):
        captioning = objective.captioning(batch)
        terms = {"twice": 2 * captioning.detach()}
        return GroundingLoss(loss=2 * captioning, captioning=captioning.detach(), terms=terms)

    model = grounded()
    start = {name: value.detach().clone() for name, value in model.adapter.named_parameters()}
    trainer = GroundingTrainer(model, arguments(tmp_path, data_dependent_init=False), ROWS, ROWS, loss=only_captioning)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["loss"] == pytest.approx(2 * entry["captioning"], abs=1e-3) for entry in steps) and len(steps) == 3
    assert "text_retrieval" not in steps[0] and "terms" not in steps[0]
    assert all(entry["twice"] == pytest.approx(entry["loss"], abs=1e-3) for entry in steps)
    changed = {name for name, value in model.adapter.named_parameters() if not torch.equal(start[name], value)}
    assert "image_projection.weight" in changed and "image_retrieval_projection.weight" not in changed
    assert trainer.evaluate()["eval_loss"] > 0
    with pytest.raises(GroundingTypeError, match="got int"):
        GroundingTrainer(model, arguments(tmp_path), ROWS, loss=3)
    with pytest.raises(GroundingValueError, match=r"\['weight', 'bias'\]"):
        GroundingTrainer(model, arguments(tmp_path), ROWS, loss=torch.nn.Linear(2, 2))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_in_a_part_of_a_step_stops_the_step(tmp_path, where):
    """The question is asked once for all batches of an accumulated step."""
    model = grounded()
    trainer = GroundingTrainer(model, arguments(tmp_path, gradient_accumulation_steps=3), ROWS)
    calls, asked, weights = [], [], {}
    objective, run = trainer.model.forward, trainer._finite_check.run
    trainer._finite_check.run = lambda *args, **options: asked.append(1) or run(*args, **options)

    def poisoned(**inputs):
        calls.append(inputs["rows"].tolist())
        weights.update({name: value.detach().clone() for name, value in model.adapter.named_parameters()})
        losses = objective(**inputs)
        if len(calls) == 1 and where == "loss":
            # The loss alone is not finite; its gradient is that of the loss.
            losses = type(losses)(**{**losses, "loss": losses.loss + torch.tensor(float("inf"))})
        if len(calls) == 1 and where == "gradient":
            losses.loss.register_hook(lambda gradient: gradient * float("nan"))
        return losses

    trainer.model.forward = poisoned
    with pytest.raises(GroundingValueError, match="not finite|became inf") as error:
        trainer.train()
    named = calls[0] if where == "loss" else sum(calls, [])
    assert f"at step 0, in the batch of examples {named}" in str(error.value)
    assert len(calls) == 3 and asked == [1]
    assert all(torch.equal(weights[name], value) for name, value in model.adapter.named_parameters())


def test_an_evaluation_loss_that_is_not_finite_is_named(tmp_path):
    trainer = GroundingTrainer(grounded(), arguments(tmp_path, per_device_eval_batch_size=4), ROWS, ROWS)
    objective, calls = trainer.model.forward, []

    def poisoned(**inputs):
        calls.append(1)
        losses = objective(**inputs)
        return losses if len(calls) != 2 else type(losses)(**{**losses, "loss": losses.loss * float("nan")})

    trainer.model.forward = poisoned
    with pytest.raises(GroundingValueError, match=r"evaluation loss became nan in the batch .* \[4, 5, 6, 7\]"):
        trainer.evaluate()
