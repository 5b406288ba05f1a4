"""What a run does not take: settings without a meaning here, and parameters that no checkpoint would hold."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from tests.tiny import build, grounded, picture, tokenizer
from tests.training.runs import ROWS, arguments
from visual_ground import GroundedModel, GroundingTrainer
from visual_ground.errors import GroundingTypeError, GroundingValueError
from visual_ground.training.checks import freeze_others

# PEFT asks transformers for it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
QUICK = dict(data_dependent_init=False, max_steps=1)


@pytest.mark.parametrize(
    "name, value",
    [
        ("neftune_noise_alpha", 5.0),
        ("label_smoothing_factor", 0.1),
        ("bf16_full_eval", True),
        ("include_num_input_tokens_seen", True),
        ("accelerator_config", {"dispatch_batches": True}),
        ("train_sampling_strategy", "group_by_length"),
        ("torch_compile", True),
        ("debug", "underflow_overflow"),
        ("learning_rate", float("nan")),
        ("retrieval_loss_scale", float("nan")),
        ("max_grad_norm", float("nan")),
        ("max_grad_norm", -1.0),
        ("caption_loss_scale", -1.0),
        ("learning_rate", float("inf")),
        ("prefix_cache_gb", float("inf")),
        ("weight_decay", float("-inf")),
        ("gradient_accumulation_steps", 0),
    ],
)
def test_settings_without_a_meaning_are_refused_by_name(name, value, tmp_path):
    with pytest.raises(GroundingValueError, match="dispatch_batches" if name == "accelerator_config" else name):
        arguments(tmp_path, **{name: value})


@pytest.mark.parametrize("name", ["data_collator", "compute_metrics", "model_init", "compute_loss_func", "colour"])
def test_arguments_without_a_meaning_are_refused_by_name(name, tmp_path):
    with pytest.raises(GroundingTypeError, match=name):
        GroundingTrainer(grounded(), arguments(tmp_path), ROWS, **{name: print})


def test_predictions_of_logits_are_refused_by_name(tmp_path):
    trainer = GroundingTrainer(grounded(), arguments(tmp_path, num_logged_examples=0), ROWS)
    with pytest.raises(GroundingTypeError, match="model.generate"):
        trainer.predict(ROWS)


def test_plain_arguments_are_refused_by_name(tmp_path):
    with pytest.raises(GroundingTypeError, match="GroundingTrainingArguments, got TrainingArguments"):
        GroundingTrainer(grounded(), TrainingArguments(output_dir=str(tmp_path), use_cpu=True), ROWS)


def test_settings_that_change_nothing_are_taken(tmp_path):
    assert arguments(tmp_path, max_grad_norm=None).max_grad_norm == 0
    args = arguments(tmp_path, remove_unused_columns=True, max_grad_norm=float("inf"), **QUICK)
    model = grounded()
    GroundingTrainer(model, args, ROWS).train()
    model.save_pretrained(tmp_path / "saved")
    assert model.active.report.training["max_grad_norm"] == "inf"


def test_nothing_but_the_adapter_is_trained_whatever_requires_grad_says(tmp_path, caplog):
    lm = build("llama_untied")
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    model = grounded(lm=lm)
    model.requires_grad_(True)
    trainer = GroundingTrainer(model, arguments(tmp_path, **QUICK), ROWS)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "are frozen" in caplog.text
    assert all(torch.equal(before[name], value) for name, value in lm.state_dict().items())
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.adapter.parameters()}


def test_layers_that_peft_puts_in_behind_our_back_are_frozen_and_a_frozen_part_stays_so():
    model = grounded("llama_untied")
    get_peft_model(model.lm, LoraConfig(target_modules=["q_proj"]))
    model.adapter.image_projection.requires_grad_(False)
    trainable = {id(p) for p in model.adapter.parameters() if p.requires_grad}
    freeze_others(model)
    assert {id(p) for p in model.parameters() if p.requires_grad} == trainable


def test_an_lm_adapter_that_was_asked_for_stays_trainable():
    lm = get_peft_model(build("llama_untied"), LoraConfig(target_modules=["q_proj"]))
    model = grounded(lm=lm, train_lm_adapter=True)
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    model.requires_grad_(True)
    freeze_others(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted
    assert any("lora" in name for name in wanted)


def test_an_optimizer_over_other_parameters_is_refused(tmp_path):
    model = grounded()
    optimizer = torch.optim.SGD([*model.adapter.parameters(), *model.lm.parameters()], lr=0.1)
    trainer = GroundingTrainer(model, arguments(tmp_path, **QUICK), ROWS, optimizers=(optimizer, None))
    with pytest.raises(GroundingValueError, match="do not belong to the adapter"):
        trainer.train()


@pytest.mark.parametrize("other", [{"optim": "sgd"}, {"projector_learning_rate": 1e-3}], ids=["sgd", "groups"])
def test_another_optimizer_is_refused_when_a_run_is_resumed(other, tmp_path):
    saving = dict(data_dependent_init=False, save_strategy="steps", save_steps=1)
    torch.manual_seed(0)
    GroundingTrainer(grounded(), arguments(tmp_path, max_steps=1, **saving), ROWS).train()
    torch.manual_seed(0)
    trainer = GroundingTrainer(grounded(), arguments(tmp_path, max_steps=2, **saving, **other), ROWS)
    with pytest.raises(GroundingValueError, match="another optimizer"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_adapter_stays_in_float32_and_what_is_saved_can_be_loaded(dtype, tmp_path):
    model = grounded("llama_untied")
    before = {name: value.clone() for name, value in model.adapter.state_dict().items()}
    model.to(dtype)
    after = model.adapter.state_dict()
    assert all(value.dtype.itemsize >= 4 and torch.equal(value.float(), before[name]) for name, value in after.items())
    GroundingTrainer(model, arguments(tmp_path, **QUICK), ROWS).train()
    model.save_pretrained(tmp_path / "saved")
    loaded = GroundedModel.from_pretrained(build("llama_untied"), tmp_path / "saved", grounded().vision, tokenizer())
    assert {value.dtype for value in loaded.adapter.state_dict().values()} == {torch.float32}


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    model = grounded()
    model.save_pretrained(tmp_path / "saved")
    before = (tmp_path / "saved" / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        model.adapter.ret_input[0] = float("nan")
    for folder in ("saved", "new"):
        with pytest.raises(
            GroundingValueError, match=r"\['ret_input'\] of the adapter hold numbers that are not finite"
        ):
            model.save_pretrained(tmp_path / folder)
    assert (tmp_path / "saved" / "adapter_model.safetensors").read_bytes() == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_an_lm_of_any_dtype_answers(dtype):
    model = grounded()
    model.lm.to(dtype)
    answer = model.generate([["w4", picture(0), "w5"]], max_new_tokens=4, ret_bias=100.0)[0]
    assert answer.images and torch.isfinite(model.embed_text(["w4"])).all()
