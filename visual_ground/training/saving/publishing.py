"""What a run notes on its adapter's card; `Publisher` puts it on the Hub as `GroundedModel.push_to_hub` does.

transformers' `Trainer` uploads its whole output folder. Here that has drawings of evaluation pictures, image features,
logs, and training arguments with local paths and the Hub's token.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from visual_ground.adapter.files import push_saved
from visual_ground.adapter.model_card import render_card
from visual_ground.errors import GroundingFileError, GroundingTypeError, GroundingValueError
from visual_ground.model import GroundedModel
from visual_ground.storage.atomic import replacing
from visual_ground.storage.hub import CARD_FILE, PushOptions, make_repository

logger = logging.getLogger(__name__)

# The arguments that an adapter's card shows: those that decide what is learnt, and so what a reader needs to train
# another adapter alike. Folders, logging and the layout in memory are the machine's business.
RECORDED_ARGUMENTS = (
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "caption_loss_scale",
    "retrieval_loss_scale",
    "concat_captions_prob",
    "captioning_fraction",
    "max_caption_length",
    "seed",
)

# How the arguments of `Trainer.create_model_card` are named in a card's metadata.
CARD_KEYS = {
    "language": "language",
    "license": "license",
    "tags": "tags",
    "model_name": "model_name",
    "finetuned_from": "base_model",
    "tasks": "pipeline_tag",
    "dataset_tags": "datasets",
    "dataset": "datasets",
}


class Publisher:
    """Pushes a run's adapter to the Hub.

    Args:
        model: the model whose adapter is trained.
        args: the run's settings: `push_to_hub` and all that begin with `hub_`.

    Raises:
        GroundingValueError: a `hub_strategy` that uploads checkpoints.
    """

    def __init__(self, model: GroundedModel, args: TrainingArguments) -> None:
        self.model, self.args = model, args
        self.repo_id: str | None = None
        if args.push_to_hub and args.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
            raise GroundingValueError(
                f"hub_strategy={HubStrategy(args.hub_strategy).value!r} would upload checkpoints, which hold the state "
                "of the run and local paths; only the adapter is published. Use 'every_save' or 'end', and resume "
                "from the output folder."
            )

    def open(self, token: str | None = None, private: bool | None = None) -> str:
        """Return the repository's full name; it is made where it is new. GroundingFileError where the Hub refuses."""
        if self.repo_id is None:
            name = self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
            self.repo_id = make_repository(name, self._options(token, private))
        return self.repo_id

    def push(
        self,
        message: str | None,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> str:
        """Commit the adapter as it is now; return the commit's address.

        Args:
            message: the commit's first line.
            token: in place of `args.hub_token`.
            revision: in place of `args.hub_revision`.
            private: in place of `args.hub_private_repo`.
            card: as for `Trainer.create_model_card`, for the card's metadata.

        Raises:
            GroundingFileError: the Hub did not take it, and is as it was.
            GroundingTypeError: no argument of `Trainer.create_model_card`.
        """
        values = card_values(card)
        options = self._options(token, private, revision or self.args.hub_revision, message)
        if not values:
            return self.model.push_to_hub(self.open(token, private), **vars(options))
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            edit_card(Path(folder, CARD_FILE), values)
            return push_saved(folder, self.open(token, private), options)

    def write_card(self, path: Path, **card: Any) -> None:
        """Write the adapter's card, with what people wrote into an earlier one; the arguments are as in `push`."""
        values = card_values(card)
        earlier = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
        size = sum(parameter.numel() for parameter in self.model.adapter.state_dict().values())
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as written:
            written.write_text(render_card(self.model.active.metadata, size, self.repo_id, earlier), encoding="utf-8")
            edit_card(written, values)

    def push_checkpoint(self, step: int) -> None:
        """Push after a checkpoint, where the settings ask for it; one that fails is reported, and training goes on."""
        wanted = self.args.push_to_hub and self.args.hub_strategy == HubStrategy.EVERY_SAVE
        if wanted and self.args.process_index == 0:
            try:
                self.push(f"Training in progress, step {step}")
            except GroundingFileError as error:
                logger.warning("Training goes on, and the next checkpoint is pushed again. %s", error)

    def _options(
        self, token: str | None, private: bool | None, revision: str | None = None, message: str | None = None
    ) -> PushOptions:
        private = self.args.hub_private_repo if private is None else private
        return PushOptions(private, revision, token or self.args.hub_token, message)


def card_values(given: dict[str, Any]) -> dict[str, Any]:
    """Return a card's metadata from arguments of `Trainer.create_model_card`; `dataset_args` have no place in it.

    Example:
        >>> card_values({"tags": "cats", "dataset": None})
        {'tags': ['cats']}
    """
    if unknown := sorted(set(given) - {*CARD_KEYS, "dataset_args"}):
        raise GroundingTypeError(f"Unknown arguments {unknown}; a card takes {list(CARD_KEYS)}.")
    values = {CARD_KEYS[name]: value for name, value in given.items() if value and name in CARD_KEYS}
    lists = {key: [values[key]] for key in ("tags", "datasets") if isinstance(values.get(key), str)}
    return {**values, **lists}


def edit_card(path: str | os.PathLike[str], values: dict[str, Any]) -> None:
    """Write values, if there are any, into a card's metadata; tags are added to those that are there."""
    if not values:
        return
    from huggingface_hub import ModelCard

    card: Any = ModelCard(Path(path).read_text(encoding="utf-8"), ignore_metadata_errors=True)
    for key, value in values.items():
        earlier = [tag for tag in card.data.get(key) or () if tag not in value] if key == "tags" else []
        setattr(card.data, key, [*earlier, *value] if key == "tags" else value)
    Path(path).write_text(str(card), encoding="utf-8")


def record_settings(model: GroundedModel, args: TrainingArguments, examples: Any) -> None:
    """Note on the adapter's card that it is trained here, and how; pairs of a stream are not counted."""
    pairs = {"pairs": len(examples)} if hasattr(examples, "__len__") else {}
    settings = {name: _recorded(getattr(args, name)) for name in RECORDED_ARGUMENTS}
    model.active.record_training({**pairs, "library_version": version("visual-ground"), **settings})


def _recorded(value: Any) -> Any:
    """Return a value as JSON has it, which knows no infinity: `max_grad_norm=inf` clips nothing."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
