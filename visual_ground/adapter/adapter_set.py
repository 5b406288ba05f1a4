"""`AdapterSet`: the adapters of a grounded model by name, of which one is active."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, TypeVar, cast

from torch import Tensor, nn

from visual_ground.adapter.attached import AttachedAdapter
from visual_ground.adapter.files import AdapterFiles
from visual_ground.config import GroundingConfig
from visual_ground.errors import GroundingStateError, GroundingValueError
from visual_ground.lm.base.fingerprint import warn_of_differences
from visual_ground.lm.base.freezing import FreezeGuard

DEFAULT = "default"  # PEFT's name for the first adapter.
T = TypeVar("T")


class OfActive(Generic[T]):
    """A read-only attribute of a grounded model that is the active adapter's attribute of the same name."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, model: Any, owner: type | None = None) -> T:
        return cast(T, self if model is None else getattr(model.adapters.active, self._name))

    def __set__(self, model: Any, value: Any) -> None:
        raise AttributeError(f"{self._name} belongs to the active adapter; change it with add_adapter or set_adapter.")


class AdapterSet(nn.Module):
    """Adapters by name, which are added, loaded and switched as in PEFT; the first is "default".

    Attributes:
        active_name: the adapter that is used, trained and saved; the others are frozen and unused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.attached = nn.ModuleDict()
        self._freeze_guard = FreezeGuard()
        self.active_name = DEFAULT

    def __iter__(self) -> Iterator[str]:
        return iter(self.attached)

    def __len__(self) -> int:
        return len(self.attached)

    def __getitem__(self, name: str) -> AttachedAdapter:
        if name not in self.attached:
            raise GroundingValueError(f"There is no adapter {name!r}; there are {list(self)}.")
        return cast(AttachedAdapter, self.attached[name])

    @property
    def active(self) -> AttachedAdapter:
        """The active adapter."""
        return self[self.active_name]

    def ret_embeddings(self) -> tuple[Tensor, Tensor]:
        """Return the active adapter's `[RET]` embeddings, (d,) and (h,)."""
        return self.active.adapter.ret_embeddings()

    def masks_spare_columns(self) -> bool:
        """Return whether the active adapter sets the logits of ids that no token has to -inf."""
        return self.active.config.mask_spare_columns

    def check_new(self, name: str, config: GroundingConfig) -> None:
        """Raise GroundingValueError where an adapter of this name and these settings cannot be added."""
        if not name or "." in name or name in self.attached:
            raise GroundingValueError(
                f"An adapter's name must be new and without dots, got {name!r}; there are {list(self)}."
            )
        if config.train_lm_adapter:
            raise GroundingValueError(
                "An adapter with train_lm_adapter=True needs its own PEFT adapter in the LM, and these are not "
                "switched here. Load it alone, with GroundedModel.from_pretrained."
            )

    def add(self, name: str, attached: AttachedAdapter) -> AttachedAdapter:
        """Add an adapter by a new name, frozen unless it is the first; its encoder is frozen in any case."""
        if not any(attached.vision is self[other].vision for other in self):
            self._freeze_guard.add(attached.vision)
        self.attached[name] = attached
        attached.adapter.set_trainable(name == self.active_name)
        return attached

    def load(self, name: str, files: AdapterFiles, is_trainable: bool, lm: nn.Module) -> None:
        """Load a saved adapter's tensors into one that was added with its settings, or remove that where it fails."""
        attached = self[name]
        try:
            attached.load_weights(files.folder, lm)
        except BaseException:
            del self.attached[name]
            raise
        attached.metadata, attached.anchors, attached.is_trainable = files.metadata, files.anchors, is_trainable
        attached.keep_encoder_name()
        attached.source = files.name
        base = files.metadata.provenance.get("base_model_name_or_path")
        warn_of_differences(files.metadata.fingerprint, attached.spec.fingerprint, base)
        attached.adapter.kept = frozenset(files.metadata.kept)
        attached.adapter.set_trainable(is_trainable and name == self.active_name)
        if files.config.train_lm_adapter and not is_trainable:
            lm.requires_grad_(False)

    def set(self, name: str) -> None:
        """Make an adapter the active one; raise GroundingValueError where none has this name."""
        attached = self[name]
        for other in self:
            self[other].adapter.set_trainable(False)
        attached.adapter.set_trainable(attached.is_trainable)
        self.active_name = name

    def delete(self, name: str) -> None:
        """Remove an adapter; raise GroundingValueError where there is none, GroundingStateError where it is active."""
        self[name]  # Raises where there is none.
        if name == self.active_name:
            raise GroundingStateError(f"{name!r} is the active adapter. Call set_adapter with another name first.")
        del self.attached[name]

    def release(self) -> None:
        """Leave the encoders as they were before they were frozen."""
        self._freeze_guard.restore()
        for name in self:
            self[name].vision.release()
