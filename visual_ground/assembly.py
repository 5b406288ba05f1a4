"""`GroundedParts`: a frozen LM with its hooks, and adapters on it by name, each with its encoder and settings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from visual_ground.adapter import Adapter
from visual_ground.config import GroundingConfig
from visual_ground.language import Frozen, LanguageFacts, core_of
from visual_ground.language_weights import embedding_device
from visual_ground.lm_adapters import tuner_layers
from visual_ground.parts import new_adapter
from visual_ground.prompts import PromptEncoder
from visual_ground.record import AdapterRecord, Report
from visual_ground.virtual_rows import VirtualRows
from visual_ground.vision import VisionEncoder

if TYPE_CHECKING:
    from typing_extensions import Self

DEFAULT = "default"


@dataclass(frozen=True)
class Fitting:
    """What belongs to one adapter of a grounded model besides its tensors.

    Args:
        config: its settings.
        facts: what was read of the LM for them.
        names: of the parts that are here.
        encoder: turns prompts into ids as its settings say.
        record: what its file says; after loading, of the parts that it was trained with.
    """

    config: GroundingConfig
    facts: LanguageFacts
    names: dict[str, str | None]
    encoder: PromptEncoder
    record: AdapterRecord


class GroundedParts(nn.Module):
    """A frozen LM where it is, and the adapters on it, of which one is active.

    The LM is used where it is: hooks at its two ends give it `[RET]` and this call's image rows (`virtual_rows`).

    Args:
        lm: a causal LM; may be a `PeftModel`.
        tokenizer: its tokenizer, never written to.
        vision: the encoder.
        config: the settings.
        facts: what was read of the LM.
        names: `base_model_name_or_path`, `revision`, `vision_encoder`, `vision_revision` of these parts.

    Attributes:
        lm, vision, adapter, tokenizer, image_processor, config, ret_token_id: the parts.
        adapters, active_adapter: all adapters by name, and the name of the one in use.
        trainable_adapters: names of those that are trained while they are active.
    """

    def __init__(
        self,
        lm: nn.Module,
        tokenizer: Any,
        vision: VisionEncoder,
        config: GroundingConfig,
        facts: LanguageFacts,
        names: Mapping[str, str | None],
    ) -> None:
        super().__init__()
        self.lm, self.tokenizer = lm, tokenizer
        self.adapters, self.visions = nn.ModuleDict(), nn.ModuleDict()
        self._fittings: dict[str, Fitting] = {}
        self.active_adapter, self.trainable_adapters = DEFAULT, set[str]()
        self.ret_token_id = facts.vocabulary.ret_token_id
        tuned = tuner_layers(lm) if config.train_lm_adapter else []
        self._frozen = Frozen(lm)
        for layer in tuned:
            layer.set_adapter(layer.active_adapters)  # Lets what PEFT has put there learn, and nothing else.
        self._fit(DEFAULT, vision, config, facts, names)
        core = core_of(lm)
        parameters = inspect.signature(core.forward).parameters
        self._takes_positions = "position_ids" in parameters
        # transformers 5.24 renamed what older ones call past_key_values.
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        self.rows = VirtualRows(core, facts.vocabulary, self._ret_rows, config.mask_spare_columns)
        self.rows.attach()

    def _fit(
        self,
        name: str,
        vision: VisionEncoder,
        config: GroundingConfig,
        facts: LanguageFacts,
        names: Mapping[str, str | None],
    ) -> None:
        """Make an adapter and put it among the others; the encoder is frozen."""
        if not any(vision is other for other in self.visions.values()):
            self._frozen.add(vision)
        adapter = new_adapter(config, facts, vision)
        self.adapters[name], self.visions[name] = adapter.to(embedding_device(self.lm)), vision
        encoder = PromptEncoder(self.tokenizer, config, self.ret_token_id)
        record = AdapterRecord(config, dict(names), facts.fingerprint)
        self._fittings[name] = Fitting(config, facts, dict(names), encoder, record)
        self.trainable_adapters.add(name)

    def _ret_rows(self) -> tuple[Tensor, Tensor]:
        return self.adapter.ret_rows()

    # The parts that the active adapter uses.

    @property
    def adapter(self) -> Adapter:
        """The active adapter."""
        return cast(Adapter, self.adapters[self.active_adapter])

    @property
    def vision(self) -> VisionEncoder:
        """The vision encoder that the active adapter reads."""
        return cast(VisionEncoder, self.visions[self.active_adapter])

    @property
    def config(self) -> GroundingConfig:
        """The active adapter's settings."""
        return self._fittings[self.active_adapter].config

    @property
    def facts(self) -> LanguageFacts:
        """What was read of the LM for the active adapter."""
        return self._fittings[self.active_adapter].facts

    @property
    def names(self) -> dict[str, str | None]:
        """Names of the parts that the active adapter uses, as in `parts.Parts`."""
        return self._fittings[self.active_adapter].names

    @property
    def encoder(self) -> PromptEncoder:
        """Turns prompts into ids as the active adapter's settings say."""
        return self._fittings[self.active_adapter].encoder

    @property
    def record(self) -> AdapterRecord:
        """What the active adapter's file says; after loading, of the parts that it was trained with."""
        return self._fittings[self.active_adapter].record

    @record.setter
    def record(self, record: AdapterRecord) -> None:
        self._fittings[self.active_adapter] = replace(self._fittings[self.active_adapter], record=record)

    @property
    def report(self) -> Report:
        """How the active adapter was made and what was measured; saved with it, and shown on its card."""
        return self.record.report

    @report.setter
    def report(self, report: Report) -> None:
        self.record = replace(self.record, report=report)

    def record_training(self, settings: Mapping[str, Any]) -> None:
        """Say that the active adapter was trained here: from now on it is these parts' own.

        Args:
            settings: what it was trained with, by name; numbers, texts and the like.
        """
        report = replace(self.report, training=dict(settings), evaluations=(), samples=(), picture=None)
        self.record = replace(self.record, names=self.names, fingerprint=self.facts.fingerprint, report=report)

    @property
    def image_processor(self) -> Any:
        """Maps a list of PIL images to `{"pixel_values": (n, c, h, w)}`."""
        return self.vision.image_processor

    def train(self, mode: bool = True) -> Self:
        """Set the adapter's mode; the frozen parts stay in evaluation mode."""
        super().train(mode)
        self.lm.eval()
        self.visions.eval()
        return self
