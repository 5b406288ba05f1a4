"""Several adapters on one LM, switched by name as PEFT does: `add_adapter`, `load_adapter`, `set_adapter`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from visual_ground import lm_adapters
from visual_ground.adapter import RowStatistics
from visual_ground.config import GroundingConfig
from visual_ground.errors import GroundingStateError, GroundingValueError
from visual_ground.fingerprint import tell_differences
from visual_ground.hub import HubOptions
from visual_ground.language import read_facts
from visual_ground.language_weights import embedding_rows, head_rows
from visual_ground.parts import find_vision, new_adapter
from visual_ground.reader import GroundedReader
from visual_ground.record import NAMES
from visual_ground.saving import WEIGHTS_FILE, read_tensors
from visual_ground.sharing import SavedAdapter
from visual_ground.vision import VisionEncoder


class SwitchingReader(GroundedReader):
    """A `GroundedReader` whose adapters are added, loaded and switched by name; the first is "default".

    Example:
        >>> model.load_adapter("me/birds", "birds")  # doctest: +SKIP
        >>> model.set_adapter("birds")  # doctest: +SKIP
    """

    def add_adapter(
        self, name: str, config: GroundingConfig | None = None, vision_encoder: Any = None, image_processor: Any = None
    ) -> None:
        """Put a new adapter with its start values beside the others; `set_adapter` makes it the active one.

        Args:
            name: a new name.
            config: its settings; `GroundingConfig()` where None.
            vision_encoder: as in `ground`; the active adapter's where None.
            image_processor: as in `ground`.

        Raises:
            GroundingValueError: a name that is taken or has a dot in it, or settings that do not go here.
        """
        config = GroundingConfig() if config is None else config
        self._check_new(name, config)
        found = find_vision(self.vision if vision_encoder is None else vision_encoder, image_processor, config)
        self._add(name, config, *found)
        before, self.active_adapter = self.active_adapter, name
        try:
            self.start_adapter()
        finally:
            self.active_adapter = before

    def load_adapter(
        self,
        adapter: str | os.PathLike,
        name: str,
        vision_encoder: Any = None,
        image_processor: Any = None,
        is_trainable: bool = False,
        **hub_options: Any,
    ) -> None:
        """Put a saved adapter beside the others; `set_adapter` makes it the active one.

        Args:
            adapter: local folder or Hub id.
            name: a new name.
            vision_encoder: as in `ground`; else the one that the adapter names, or the active adapter's where it
                names none.
            image_processor: as in `ground`.
            is_trainable: whether it is trained while it is active.
            hub_options: as in `GroundedModel.from_pretrained`.

        Raises:
            GroundingFileError, GroundingValueError: as in `GroundedModel.from_pretrained`; nothing has changed then.
        """
        options = HubOptions.of(hub_options)
        saved = SavedAdapter.find(adapter, options)
        config, names = saved.record.config, saved.record.names
        self._check_new(name, config)
        if vision_encoder is None and names.get("vision_encoder") in (None, self.vision.name):
            vision_encoder = self.vision
        vision, commit = find_vision(vision_encoder, image_processor, config, names, options.for_models())
        self._add(name, config, vision, commit, saved)
        try:
            saved.load_into(self.adapters[name])
        except BaseException:
            self._remove(name)
            raise
        fitting = self._fittings[name] = replace(self._fittings[name], record=saved.record)
        tell_differences(saved.record.fingerprint, fitting.facts.fingerprint, names.get(NAMES[0]))
        if not is_trainable:
            self.trainable_adapters.discard(name)

    def set_adapter(self, name: str) -> None:
        """Make an adapter the active one: it is used, trained and saved from now on, and the others rest.

        Raises:
            GroundingValueError: no adapter has this name.
        """
        self._check_name(name)
        self.active_adapter = name
        self.rows.mask_spare_columns = self.config.mask_spare_columns
        for other, adapter in self.adapters.items():
            adapter.requires_grad_(other == name and other in self.trainable_adapters)

    def delete_adapter(self, name: str) -> None:
        """Take an adapter away.

        Raises:
            GroundingValueError: no adapter has this name.
            GroundingStateError: it is the active one.
        """
        self._check_name(name)
        if name == self.active_adapter:
            raise GroundingStateError(f"{name!r} is the active adapter. Call set_adapter with another name first.")
        self._remove(name)

    def start_adapter(self) -> None:
        """Give the active adapter its start values, read of the LM."""
        facts = self.facts
        count = min(facts.vocabulary.num_rows, facts.vocabulary.num_tokens)
        with self.rows.call(enabled=False):
            embedding = RowStatistics.of(embedding_rows(self.lm, count))
            head = None if facts.tied else RowStatistics.of(head_rows(self.lm, count, facts.head_dim))
        self.adapter.start_from_lm(embedding, head)

    def load_weights(self, folder: str | Path) -> None:
        """Load saved tensors into the active adapter, and into the LM's PEFT adapter where it is trained beside.

        Raises:
            GroundingFileError: missing or damaged; nothing has changed then.
            GroundingValueError: other names, shapes or dtypes; each is listed, and nothing has changed.
        """
        tensors = read_tensors(Path(folder) / WEIGHTS_FILE, self.adapter.state_dict())
        if self.config.train_lm_adapter:
            lm_adapters.load_into(self.lm, folder)
        self.adapter.load_state_dict(tensors)

    def _check_new(self, name: str, config: GroundingConfig) -> None:
        """Raise where an adapter of this name and these settings cannot be put beside the others."""
        if not name or "." in name or name in self.adapters:
            raise GroundingValueError(
                f"An adapter's name must be new and without dots, got {name!r}; there are {list(self.adapters)}."
            )
        if config.train_lm_adapter:
            raise GroundingValueError(
                "An adapter with train_lm_adapter=True goes with an LM adapter of its own, which is not switched here. "
                "Load it with GroundedModel.from_pretrained."
            )
        if config.ret_token in self.tokenizer.get_vocab():
            raise GroundingValueError(f"The tokenizer has the token {config.ret_token!r} already. Choose another one.")

    def _add(
        self,
        name: str,
        config: GroundingConfig,
        vision: VisionEncoder,
        commit: str | None,
        saved: SavedAdapter | None = None,
    ) -> None:
        """Put an adapter beside the others, at rest; raise where what is saved does not fit, with nothing changed."""
        with self.rows.call(enabled=False):
            facts = read_facts(self.lm, self.tokenizer, config.text_layers)
        if saved is not None:
            with torch.device("meta"):
                saved.check_fits(new_adapter(config, facts, vision))
        names = {**self.names, "vision_encoder": vision.name, "vision_revision": commit}
        self._fit(name, vision, config, facts, names)
        self.adapters[name].requires_grad_(False)

    def _remove(self, name: str) -> None:
        del self.adapters[name], self.visions[name], self._fittings[name]
        self.trainable_adapters.discard(name)

    def _check_name(self, name: str) -> None:
        if name not in self.adapters:
            raise GroundingValueError(f"There is no adapter {name!r}; there are {list(self.adapters)}.")
