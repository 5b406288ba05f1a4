"""`GroundedModel`: the whole, switched on and off, saved, pushed and loaded; and `ground`, which makes one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from visual_ground import lm_adapters
from visual_ground.anchors import ANCHORS_FILE, Anchors
from visual_ground.config import GroundingConfig
from visual_ground.errors import GroundingTypeError, GroundingValueError
from visual_ground.fingerprint import tell_differences
from visual_ground.hub import HubOptions, PushOptions, push_folder
from visual_ground.parts import find_parts, new_adapter
from visual_ground.record import NAMES, AdapterRecord
from visual_ground.sharing import FILES, SavedAdapter, published, save_adapter
from visual_ground.speaker import GroundedSpeaker


class GroundedModel(GroundedSpeaker):
    """A frozen LM, a frozen vision encoder, and the adapter between them; made by `ground` or `from_pretrained`.

    Example:
        >>> model = ground("HuggingFaceTB/SmolLM2-135M-Instruct", "openai/clip-vit-base-patch32")  # doctest: +SKIP
        >>> model.print_trainable_parameters()  # doctest: +SKIP

    Attributes:
        anchors: captions and image features that are saved with the adapter, so that it can move to another LM.
    """

    anchors: Anchors | None = None

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside the block, the LM behaves as if it had never been grounded."""
        with self.rows.call(enabled=False):
            yield

    def unground(self) -> nn.Module:
        """Take everything off the LM and hand it back, bit for bit what it was."""
        self.rows.detach()
        self._frozen.restore()
        for vision in self.visions.values():
            vision.release()
        return self.lm

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the counts of trainable and of all parameters, as PEFT does."""
        counts = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trains in counts if trains), sum(n for n, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Print both counts and their ratio, as PEFT does."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    # On disk and on the Hub.

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write the active adapter, whole or not at all: configuration, weights, README.md and anchors.

        With `train_lm_adapter`, what PEFT has put into the LM is written into a subfolder, `lm_adapter`.

        What people wrote into an earlier README.md stays. The network is never used.
        """
        self._save(folder, self.record)

    def _save(self, folder: str | os.PathLike, record: AdapterRecord, repo_id: str | None = None) -> None:
        beside = lm_adapters.writers(self.lm) if self.config.train_lm_adapter else {}
        if self.anchors is not None:
            beside = {**beside, ANCHORS_FILE: self.anchors.write}
        save_adapter(folder, self.adapter.state_dict(), record, repo_id, beside=beside)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Commit what `save_pretrained` writes to the Hub, at once or not at all; nothing else is uploaded.

        Args:
            repo_id: made where it does not exist.
            private: whether a new repository is private.
            revision: branch, made where it does not exist.
            token: of the Hub; the one that was saved by logging in where None.
            commit_message: its first line.
            create_pr: open a pull request instead of committing.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            GroundingFileError: the Hub did not take it; the repository is as it was.
        """
        options = PushOptions(private, revision, token, commit_message, create_pr)
        record = published(self.record)
        return push_folder(lambda folder: self._save(folder, record, repo_id), repo_id, options, FILES)

    @classmethod
    def from_pretrained(
        cls,
        lm: str | nn.Module,
        adapter: str | os.PathLike | None = None,
        vision_encoder: Any = None,
        tokenizer: Any = None,
        image_processor: Any = None,
        is_trainable: bool = False,
        **hub_options: Any,
    ) -> GroundedModel:
        """Ground an LM with a saved adapter, or load an adapter with the LM that it names.

        Args:
            lm: as in `ground`; or, where nothing follows it, the adapter.
            adapter: local folder or Hub id.
            vision_encoder: for an encoder that no name can load; else the one that the adapter names.
            tokenizer: as in `ground`.
            image_processor: as in `ground`.
            is_trainable: False freezes the adapter too.
            hub_options: revision, subfolder, token, cache_dir, local_files_only; `hub.HubOptions` says what they are.

        Raises:
            GroundingFileError: no such adapter, or a damaged one, or one that names models that cannot be loaded.
            GroundingValueError: another format version, or an adapter for other widths, each named with both shapes.

        Example:
            >>> model = GroundedModel.from_pretrained("me/adapter")  # doctest: +SKIP
            >>> model = GroundedModel.from_pretrained(lm, "me/adapter", revision="v2")  # doctest: +SKIP
        """
        options = HubOptions.of(hub_options)
        given: str | nn.Module | None = lm
        if adapter is None:
            if not isinstance(lm, (str, os.PathLike)):
                raise GroundingTypeError("Which adapter? Pass a local folder or a Hub id after the language model.")
            given, adapter = None, lm
        saved = SavedAdapter.find(adapter, options)
        config, anchors = saved.record.config, Anchors.find(saved.folder)
        parts = find_parts(
            given, vision_encoder, tokenizer, image_processor, config, saved.record.names, options.for_models()
        )
        with torch.device("meta"):
            saved.check_fits(new_adapter(config, parts.facts, parts.vision))
        base = lm_adapters.attach(parts.lm, saved.folder) if config.train_lm_adapter else parts.lm
        model = cls(base, parts.tokenizer, parts.vision, config, parts.facts, parts.names)
        try:
            model.load_weights(saved.folder)
        except BaseException:
            model.unground()
            raise
        model.record, model.anchors = saved.record, anchors
        tell_differences(saved.record.fingerprint, parts.facts.fingerprint, saved.record.names.get(NAMES[0]))
        if not is_trainable:
            model.requires_grad_(False)
            model.trainable_adapters.clear()
        return model.train(is_trainable)

    def transfer_to(
        self, lm: str | nn.Module, tokenizer: Any = None, anchors: Anchors | None = None, **options: Any
    ) -> GroundedModel:
        """Move the adapter to another LM; image indexes of this model stay valid. See `transfer.transfer`.

        Args:
            lm: as in `ground`; another LM than this one.
            tokenizer: as in `ground`.
            anchors: what to fit with; those saved with this adapter where None.
            options: `refinement`, and fields of the config that are to differ.
        """
        from visual_ground.transfer import ImageSide, transfer

        return transfer(ImageSide.of(self), lm, tokenizer, self.anchors if anchors is None else anchors, **options)


def ground(
    lm: str | nn.Module,
    vision_encoder: Any = None,
    tokenizer: Any = None,
    image_processor: Any = None,
    config: GroundingConfig | None = None,
    adapter: str | os.PathLike | None = None,
) -> GroundedModel:
    """Attach an adapter between a causal LM and a vision encoder; both stay frozen.

    Args:
        lm: Hub id, local folder, a GGUF file's path, or a loaded causal LM (quantised, offloaded, or a `PeftModel`).
        vision_encoder: Hub id or folder, "open_clip:ARCHITECTURE/PRETRAINED", "timm:NAME", a loaded model of one of
            these, or any module from pixels (n, c, h, w) to features (n, f).
        tokenizer: a tokenizer or its name; found by the LM's name where None.
        image_processor: maps a list of PIL images to `{"pixel_values": (n, c, h, w)}`; found where None.
        config: the settings; `GroundingConfig()` where None.
        adapter: local folder or Hub id of an adapter to start from, with its settings and, where none is passed, its
            encoder; a new adapter where None.

    Returns:
        The grounded model, whose adapter is ready to be trained: with its start values, or those it was saved with.

    Raises:
        GroundingTypeError: not a causal LM, or not a vision encoder.
        GroundingValueError: no tokenizer, preprocessing or feature width can be found; the tokenizer has `[RET]`.
        GroundingStateError: the LM is grounded already.
        GroundingFileError: no such adapter, or a damaged one.
    """
    if adapter is not None:
        if config is not None:
            raise GroundingValueError("A saved adapter has its own settings; pass config or adapter, not both.")
        return GroundedModel.from_pretrained(lm, adapter, vision_encoder, tokenizer, image_processor, is_trainable=True)
    if vision_encoder is None:
        raise GroundingTypeError("ground needs a vision encoder, or an adapter that names one.")
    config = GroundingConfig() if config is None else config
    parts = find_parts(lm, vision_encoder, tokenizer, image_processor, config)
    model = GroundedModel(parts.lm, parts.tokenizer, parts.vision, config, parts.facts, parts.names)
    try:
        model.start_adapter()
    except BaseException:
        model.unground()
        raise
    return model.train()
