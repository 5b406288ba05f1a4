"""Adapter folders, local or on the Hub: written with their card, read strictly, pushed as one commit."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visual_ground.adapter.anchors import ANCHORS_FILE, Anchors
from visual_ground.adapter.metadata import AdapterMetadata
from visual_ground.adapter.model_card import PICTURE_FILE, render_card
from visual_ground.config import GroundingConfig
from visual_ground.errors import GroundingFileError
from visual_ground.storage.hub import CARD_FILE, HubOptions, PushOptions, fetch_folder, is_hub_name, push_folder
from visual_ground.storage.tensors import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_tensors,
    load_tensors_into,
    read_adapter_config,
    read_shapes,
    read_tensors,
    resolve,
    write_adapter,
)

logger = logging.getLogger(__name__)

# What may stand beside an adapter: anchors to move it with, and what PEFT has put into its LM.
BESIDE = (ANCHORS_FILE, "lm_adapter/adapter_config.json", "lm_adapter/adapter_model.safetensors")
FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, PICTURE_FILE, *BESIDE)
MOST_PICTURE_BYTES = 1 << 22


@dataclass(frozen=True, eq=False)
class AdapterFiles:
    """An adapter folder whose files were read and found to belong together; its tensors are still on disk.

    Args:
        folder: where it is.
        metadata: what it says.
        shapes: of its tensors, by name.
    """

    folder: Path
    metadata: AdapterMetadata
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def open(cls, name: str | os.PathLike, options: HubOptions | None = None) -> AdapterFiles:
        """Find an adapter by local folder or Hub id.

        Raises:
            GroundingFileError: no such adapter, or a damaged one.
            GroundingValueError: another format version, or a value outside its range.
        """
        options = HubOptions() if options is None else options
        is_local = Path(name).is_dir()
        folder = fetch_folder(name, FILES, options)
        values = read_adapter_config(folder)
        metadata = AdapterMetadata.from_dict(values)
        if not is_local:
            _refuse_paths(metadata.provenance, name)
        path = resolve(folder, WEIGHTS_FILE)
        shapes = {tensor: shape for tensor, (shape, _) in read_shapes(path).items()}
        if values.get("shapes") != {tensor: list(shape) for tensor, shape in shapes.items()}:
            raise GroundingFileError(
                f"{CONFIG_FILE} and {WEIGHTS_FILE} in {str(folder)!r} are not of one adapter: the shapes differ. Save "
                "the adapter again."
            )
        picture = resolve(folder, PICTURE_FILE)
        if picture.is_file() and picture.stat().st_size <= MOST_PICTURE_BYTES:
            report = replace(metadata.report, picture=picture.read_bytes())
            metadata = replace(metadata, report=report)
        return cls(folder, metadata, shapes)

    @property
    def config(self) -> GroundingConfig:
        """The settings that the adapter was built with."""
        return self.metadata.config

    @property
    def provenance(self) -> Mapping[str, str | None]:
        """Which LM and encoder it was trained with."""
        return self.metadata.provenance

    def check_fits(self, adapter: nn.Module) -> None:
        """Raise unless the tensors are those of this adapter, which may be on the meta device.

        Raises:
            GroundingValueError: names, shapes or dtypes differ; each is listed.
        """
        check_tensors(self.folder / WEIGHTS_FILE, adapter.state_dict())

    def load_into(self, adapter: nn.Module) -> None:
        """Load the tensors, all of them or none."""
        load_tensors_into(adapter, self.folder / WEIGHTS_FILE)

    @cached_property
    def anchors(self) -> Anchors | None:
        """What the adapter can be moved to another LM with, where it was saved with some."""
        return Anchors.find(self.folder)


def save_adapter(
    folder: str | os.PathLike,
    tensors: Mapping[str, Tensor],
    metadata: AdapterMetadata,
    repo_id: str | None = None,
    pages: Sequence[str] = (),
    beside: Mapping[str, Callable[[Path], object]] | None = None,
) -> None:
    """Write an adapter folder, whole or not at all; what people wrote into its card stays.

    Args:
        folder: where to.
        tensors: the adapter's state dict.
        metadata: what `adapter_config.json` says.
        repo_id: where it is to be published, for the card.
        pages: cards besides the folder's own whose edits are kept.
        beside: writers of further files, as in `folders.write_folder`.
    """
    card = render_card(metadata, sum(map(Tensor.numel, tensors.values())), repo_id, [*_cards_in(folder), *pages])
    writers = dict(beside or {})
    if metadata.report.picture is not None:
        writers[PICTURE_FILE] = partial(_write_bytes, metadata.report.picture)
    write_adapter(folder, tensors, metadata.to_dict(), card, writers)


def _write_bytes(data: bytes, path: Path) -> None:
    path.write_bytes(data)


def published(metadata: AdapterMetadata) -> AdapterMetadata:
    """Return what the Hub is told: models that were loaded from local folders go without their names."""
    local = {name: value for name, value in metadata.provenance.items() if value and not is_hub_name(value)}
    if local:
        logger.warning("These were loaded from local folders and are published without a name: %s", local)
    return replace(metadata, provenance={**metadata.provenance, **dict.fromkeys(local)})


def push_saved(folder: str | os.PathLike, repo_id: str, options: PushOptions) -> str:
    """Commit a saved adapter to the Hub without loading any model; return the commit's address.

    Args:
        folder: a local adapter folder; edits in its card are published.
        repo_id: made where it does not exist.
        options: where to, and how.

    Raises:
        GroundingFileError: no adapter, or a damaged one; or the Hub did not take it, and is as it was.
    """
    if not Path(folder).is_dir():
        raise GroundingFileError(f"{str(folder)!r} is no local folder. Only a saved adapter can be pushed.")
    saved = AdapterFiles.open(folder)
    wanted = {name: torch.empty(shape, device="meta") for name, shape in saved.shapes.items()}
    tensors, metadata = read_tensors(saved.folder / WEIGHTS_FILE, wanted), published(saved.metadata)
    _ = saved.anchors  # Damaged ones are said here, and not to those who load what was pushed.
    pages, found = _cards_in(folder), {name: resolve(folder, name) for name in BESIDE}
    beside = {name: partial(_write_bytes, path.read_bytes()) for name, path in found.items() if path.is_file()}
    return push_folder(lambda to: save_adapter(to, tensors, metadata, repo_id, pages, beside), repo_id, options, FILES)


def _cards_in(folder: str | os.PathLike) -> list[str]:
    page = resolve(folder, CARD_FILE)
    return [page.read_text(encoding="utf-8", errors="replace")] if page.is_file() else []


def _refuse_paths(names: Mapping[str, str | None], adapter: Any) -> None:
    """Raise where an adapter from elsewhere would have local files loaded as its models."""
    wrong = {name: value for name, value in names.items() if value and not is_hub_name(value)}
    if wrong:
        raise GroundingFileError(
            f"The adapter {str(adapter)!r} from the Hub names local paths, or what is none of the Hub's names: "
            f"{wrong}. Do not trust it; or download it, and load its folder with the models passed."
        )
