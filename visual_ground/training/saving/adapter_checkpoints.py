"""`AdapterCheckpoints`: the checkpoints of a training run, which hold the adapter and never the LM."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from visual_ground.errors import GroundingValueError
from visual_ground.model import GroundedModel
from visual_ground.storage.atomic import naming_errors, only_writer, resolve
from visual_ground.storage.tensors import WEIGHTS_FILE, read_adapter_config
from visual_ground.training.saving import checkpoints

# The LM is recognised by statistics of its embedding, and these are compared with some tolerance: the same LM in
# another dtype, or quantised, gives slightly different ones, and another LM very different ones.
STATISTICS_RTOL = 1e-3
EMBEDDING_MEAN_ATOL = 1e-2  # in standard deviations of the embedding, whose mean may be close to 0


class AdapterCheckpoints:
    """Finds, writes, seals, removes and loads the checkpoints of one run."""

    def __init__(self, model: GroundedModel, args: TrainingArguments) -> None:
        self.model, self.args = model, args

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(str(self.args.output_dir))

    def find(self, resume: str | os.PathLike[str] | bool | None) -> Path | None:
        """Return the checkpoint to resume from, see `checkpoints.choose`; it is one of this model.

        Raises:
            GroundingFileError: the named folder is not a complete checkpoint.
            GroundingValueError: the checkpoint of another LM or encoder, or of other settings.
        """
        checkpoint = checkpoints.choose(resume, self.folder)
        if checkpoint is not None:
            check_base(checkpoint, self.model)
        return checkpoint

    def save_adapter(self, folder: str | os.PathLike[str] | None = None) -> None:
        """Write the adapter and the training arguments, by default into the run's folder; one process does it."""
        if self.args.should_save:
            path = self.folder if folder is None else Path(folder)
            self.model.save_pretrained(path)
            args = copy.copy(self.args)
            args.hub_token = None  # A token is no setting, and folders are passed on.
            torch.save(args, path / "training_args.bin")

    def load_adapter(self, folder: str | os.PathLike[str]) -> None:
        """Load the adapter's tensors, all or none."""
        self.model.active.load_weights(folder, self.model.lm)
        self.model.adapter.keep(read_adapter_config(folder).get("kept", ()))

    @contextmanager
    def writing(self, state: TrainerState, wait_for_everyone: Callable[[], None]) -> Iterator[Path | None]:
        """Inside the block, `Trainer` writes the files of a checkpoint; after it, the checkpoint is sealed.

        The block is given the checkpoint's folder, or None in a process that writes nothing.

        Args:
            state: the trainer's state, for the step and the best checkpoint.
            wait_for_everyone: returns when all processes have called it.

        Raises:
            GroundingFileError: the checkpoint could not be written, and was removed again; or another run is writing
                one into the same folder.
        """
        folder = self.folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        writes, limit = self.args.should_save, self.args.save_total_limit
        with self._as_only_run(folder) if writes else nullcontext():
            wait_for_everyone()
            # Without a limit, Trainer removes no older checkpoint: that waits until the new one is sealed.
            self.args.save_total_limit = None
            try:
                with checkpoints.removed_unless_written(folder, writes):
                    yield folder if writes else None
                    wait_for_everyone()
                    if writes:
                        checkpoints.seal(folder)
            finally:
                self.args.save_total_limit = limit
            if writes:
                checkpoints.settle(folder)
                checkpoints.remove_surplus(self.folder, limit, state.best_model_checkpoint)

    @contextmanager
    def _as_only_run(self, folder: Path) -> Iterator[None]:
        """Inside the block, no other run writes a checkpoint beside this one; an earlier one of the step is aside."""
        with naming_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with only_writer(self.folder):
                checkpoints.settle(folder)  # Of a process that was killed meanwhile.
                checkpoints.set_aside(folder)
                try:
                    yield
                except BaseException:
                    checkpoints.settle(folder)
                    raise


def check_base(folder: str | os.PathLike[str], model: GroundedModel) -> None:
    """Raise unless a checkpoint was written for this model's LM, vision encoder and settings.

    The LM is recognised by the mean and the spread of its embedding and not by its name, since a folder may have moved.
    """
    metadata, current = read_adapter_config(folder), model.config.to_dict()
    if metadata["config"] != current:
        changed = {k: (value, current.get(k)) for k, value in metadata["config"].items() if current.get(k) != value}
        raise GroundingValueError(
            f"{folder} was written with other settings, as (checkpoint, now): {changed}. Use the settings of the "
            "checkpoint, or another output folder."
        )
    buffers = {name: tensor.cpu() for name, tensor in model.adapter.named_buffers()}
    with safe_open(resolve(folder, WEIGHTS_FILE), framework="pt") as file:
        saved = {name: file.get_tensor(name) for name in buffers if name in file.keys()}
    provenance = model.active.provenance
    same_vision = metadata["vision_encoder"] == provenance["vision_encoder"]
    if not same_vision or saved["feature_mean"].shape != buffers["feature_mean"].shape:
        raise GroundingValueError(
            f"{folder} was written for another vision encoder: {metadata['vision_encoder']!r}, and this run's is "
            f"{provenance['vision_encoder']!r}. Use the checkpoint's encoder, or another output folder."
        )
    mean_atol = EMBEDDING_MEAN_ATOL * float(buffers["embedding_std"].mean())
    for name, atol in (("embedding_std", 0.0), ("embedding_mean", mean_atol)):
        same_shape = saved[name].shape == buffers[name].shape
        if not same_shape or not torch.allclose(saved[name], buffers[name], rtol=STATISTICS_RTOL, atol=atol):
            raise GroundingValueError(
                f"{folder} was written for another base model: {metadata['base_model_name_or_path']!r}, and this run's "
                f"is {provenance['base_model_name_or_path']!r}. Use the checkpoint's model, or another output folder."
            )
