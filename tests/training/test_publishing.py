"""What a training run puts on the Hub: the adapter, as `GroundedModel.push_to_hub` puts it there, and nothing else."""

import logging

import pytest
from transformers import TrainerCallback
from transformers.integrations.integration_utils import WandbLogModel

from tests.storage.hub_client import hub  # noqa: F401
from tests.tiny import grounded
from tests.training.runs import ROWS, arguments
from visual_ground import GroundingTrainer
from visual_ground.adapter.files import FILES
from visual_ground.errors import GroundingFileError, GroundingTypeError, GroundingValueError
from visual_ground.training.checks import check_callbacks

# huggingface_hub's own call of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
ALLOWED = {*FILES, ".gitattributes"}


def run(folder, rows=ROWS[:8], evaluated=ROWS[:4], **changes):
    hub_settings = dict(push_to_hub=True, hub_model_id="me/adapter", hub_token="writer")
    saving = dict(save_strategy="steps", save_steps=1, max_steps=2, eval_strategy="steps", eval_steps=1)
    saving |= dict(data_dependent_init=False)  # quick
    return GroundingTrainer(
        grounded("llama_untied"), arguments(folder, **{**saving, **hub_settings, **changes}), rows, evaluated
    )


@pytest.mark.parametrize("strategy, saving", [("every_save", "steps"), ("every_save", "no"), ("end", "steps")])
def test_a_run_publishes_its_adapter_and_nothing_else_of_its_folder(strategy, saving, hub, tmp_path):  # noqa: F811
    trainer = run(tmp_path / "run", hub_strategy=strategy, save_strategy=saving)
    trainer.train()
    # What must not leave: features of the images, pictures of the evaluation, logs, a pickle of the arguments.
    kept = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"features", "pictures", "training_args.bin"} <= kept
    assert b"writer" not in (tmp_path / "run" / "training_args.bin").read_bytes()
    repo = hub.repos["models", "me/adapter"]
    trained = hub.files("me/adapter")
    for commit in repo.commits.values():
        assert {*commit} <= ALLOWED
        assert all(str(tmp_path).encode() not in file.data and b"writer" not in file.data for file in commit.values())
    # The last checkpoint is the adapter at the end, which is not committed twice.
    at_each = ["Training in progress, step 1", "Training in progress, step 2"]
    pushes = at_each if strategy == "every_save" and saving == "steps" else ["End of training"]
    assert repo.messages == ["initial", *pushes]
    trainer.grounded.push_to_hub("me/again", token="writer")
    again = hub.files("me/again")
    assert trained.keys() == again.keys()
    assert all(trained[name] == again[name] for name in trained if name != "README.md")


def test_a_private_repository_and_another_branch_are_asked_for_once(hub, tmp_path):  # noqa: F811
    trainer = run(tmp_path, hub_private_repo=True, hub_revision="second", hub_strategy="end", max_steps=1)
    assert hub.repos["models", "me/adapter"].private
    trainer.train()
    assert "adapter_config.json" in hub.files("me/adapter", "second")
    assert "adapter_config.json" not in hub.files("me/adapter")


def test_a_push_by_hand_takes_what_transformers_takes(hub, tmp_path):  # noqa: F811
    trainer = run(tmp_path / "named", push_to_hub=False, hub_model_id=None)
    address = trainer.push_to_hub("by hand", blocking=False, tags="cats", license="mit", dataset="me/pairs")
    assert "/me/named/commit/" in address and {*hub.files("me/named")} <= ALLOWED
    card = hub.files("me/named")["README.md"].decode()
    assert "- cats" in card and "- visual_ground" in card and "license: mit" in card and "- me/pairs" in card
    with pytest.raises(GroundingTypeError, match="colour"):
        trainer.push_to_hub(colour="red")
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert [name for _, name in hub.repos] == ["me/named"]


def test_a_card_is_written_where_the_run_writes_and_what_people_wrote_stays(hub, tmp_path):  # noqa: F811
    trainer = run(tmp_path, push_to_hub=False)
    trainer.create_model_card(language="en", tags=["cats"], model_name="eyes", finetuned_from="me/lm")
    page = tmp_path / "README.md"
    assert all(word in page.read_text() for word in ("language: en", "- cats", "- adapter", "base_model: me/lm"))
    page.write_text(page.read_text() + "\nMy own words.\n")
    trainer.create_model_card()
    assert all(word in page.read_text() for word in ("My own words.", "- cats", "language: en"))
    assert not hub.repos


def callback(name, **attributes):
    """Return a callback that is called as one of transformers' own, which need packages that are not here."""
    return type(name, (TrainerCallback,), attributes)()


WHOLE = [
    ("WandbCallback", "WANDB_LOG_MODEL", "end", "whole language model"),
    ("WandbCallback", "WANDB_LOG_MODEL", "checkpoint", "whole language model"),
    ("DVCLiveCallback", "HF_DVCLIVE_LOG_MODEL", "all", "output folder"),
    ("CometCallback", "COMET_LOG_ASSETS", "TRUE", "output folder"),
    ("DagsHubCallback", "HF_DAGSHUB_LOG_ARTIFACTS", "1", "training data"),
]


@pytest.mark.parametrize("name, variable, value, what", WHOLE)
def test_no_tracker_uploads_the_lm_or_the_output_folder(name, variable, value, what, monkeypatch, tmp_path):
    trainer = run(tmp_path, push_to_hub=False, max_steps=1)
    trainer.add_callback(callback(name))
    for harmless in ("false", ""):
        monkeypatch.setenv(variable, harmless)
        check_callbacks(trainer.callback_handler.callbacks, trainer.args, False)
    monkeypatch.setenv(variable, value)
    with pytest.raises(GroundingValueError, match=f"{variable}={value}.*{what}"):
        trainer.train()
    assert trainer.state.global_step == 0 and not (tmp_path / "checkpoint-1").exists()


def test_a_tracker_that_is_made_to_upload_the_lm_is_refused_whatever_the_environment_says(monkeypatch, tmp_path):
    args = arguments(tmp_path)

    def check(*callbacks):
        check_callbacks(callbacks, args, False)

    monkeypatch.delenv("HF_DVCLIVE_LOG_MODEL", raising=False)
    check(callback("DVCLiveCallback", _log_model=False), callback("WandbCallback", _log_model=None))
    for asked in (True, "all"):
        derived = type("Mine", (type(callback("DVCLiveCallback")),), {"_log_model": asked})()
        with pytest.raises(GroundingValueError, match="DVCLiveCallback upload"):
            check(derived)
    with pytest.raises(GroundingValueError, match="WANDB_LOG_MODEL=end"):
        check(callback("WandbCallback", _log_model=WandbLogModel.END))
    check(callback("WandbCallback", _log_model=WandbLogModel.FALSE))


def test_a_log_that_would_be_published_with_the_run_is_refused_before_anything_is_pushed(hub, tmp_path):  # noqa: F811
    made = run(tmp_path, trackio_static_space_id="me/log").args
    for settings, publishes, refused in [
        (dict(push_to_hub=True), True, True),
        (dict(push_to_hub=True, trackio_static_space_id="me/log"), True, True),
        (dict(push_to_hub=True, trackio_static_space_id=False), True, False),
        (dict(push_to_hub=True, trackio_space_id="me/space"), True, False),
        (dict(push_to_hub=False), False, False),
    ]:
        args = run(tmp_path / str(len(str(settings))), **settings).args
        if refused:
            with pytest.raises(GroundingValueError, match="trackio_static_space_id=False"):
                check_callbacks([callback("TrackioCallback")], args, publishes)
        else:
            check_callbacks([callback("TrackioCallback")], args, publishes)
    trainer = run(tmp_path / "by hand", push_to_hub=False)
    trainer.add_callback(callback("TrackioCallback"))
    with pytest.raises(GroundingValueError, match="local paths"):
        trainer.push_to_hub()
    assert made.push_to_hub and all(len(repo.commits) <= 1 for repo in hub.repos.values())


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_checkpoints_are_not_uploaded(strategy, hub, tmp_path):  # noqa: F811
    with pytest.raises(GroundingValueError, match=f"{strategy}.*only the adapter"):
        run(tmp_path, hub_strategy=strategy)
    assert not hub.repos


def test_a_busy_hub_ends_no_training_and_a_closed_one_is_named_before_it(hub, tmp_path, caplog):  # noqa: F811
    trainer = run(tmp_path / "run")
    hub.fail("POST", "/commit/", 500, times=1)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "Training goes on" in caplog.text
    assert hub.repos["models", "me/adapter"].messages[1:] == ["Training in progress, step 2"]
    assert (tmp_path / "run" / "checkpoint-1" / "sealed.json").is_file()
    with pytest.raises(GroundingFileError, match="403"):
        run(tmp_path / "other", hub_token="reader", hub_model_id="me/other")


def test_a_hub_that_is_closed_at_the_end_loses_nothing(hub, tmp_path):  # noqa: F811
    trainer = run(tmp_path / "run", save_strategy="no", max_steps=1)
    hub.fail("POST", "/commit/", 500, times=9)
    with pytest.raises(GroundingFileError, match="did not take it"):
        trainer.train()
    hub.faults.clear()
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    trainer.push_to_hub()
    assert (
        hub.files("me/adapter")["adapter_model.safetensors"]
        == (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    )
