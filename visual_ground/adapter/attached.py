"""`AttachedAdapter`: an adapter with the vision encoder and the processor that belong to it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visual_ground.adapter.adapter import NEWER, Adapter
from visual_ground.adapter.anchors import ANCHORS_FILE, Anchors
from visual_ground.adapter.files import FILES, published, save_adapter
from visual_ground.adapter.metadata import AdapterMetadata
from visual_ground.adapter.report import Report
from visual_ground.config import GroundingConfig
from visual_ground.errors import GroundingValueError
from visual_ground.lm.base import peft as lm_peft
from visual_ground.lm.base.spec import LMSpec
from visual_ground.prompts.processor import GroundingProcessor
from visual_ground.storage.hub import PushOptions, push_folder
from visual_ground.storage.tensors import WEIGHTS_FILE, read_tensors
from visual_ground.vision.encoder import VisionEncoder
from visual_ground.vision.features.recent import RecentFeatures
from visual_ground.vision.identity import ImageSpace, reference_pictures
from visual_ground.vision.images import Images


class AttachedAdapter(nn.Module):
    """All that one adapter of a grounded model needs besides the LM.

    Args:
        config: the settings.
        spec: what was read from the LM.
        vision: the encoder, frozen.
        tokenizer: the LM's, never written to.
        max_length: tokens that fit into the LM's context; None: not known.
        provenance: where the LM and the encoder come from, as `AdapterMetadata.provenance`.

    Attributes:
        adapter: what is trained.
        processor: turns prompts into ids as the settings say.
        metadata: the content of its `adapter_config.json`; after loading, with the LM and encoder it was trained with.
        anchors: captions and image features that are saved with it, so that it can move to another LM.
        is_trainable: whether it is trained while it is active.
        source: the folder or Hub id that it was loaded from or saved to last; None for neither.
        recent_features: the encoder with a memory, for conversations that show it the same images at every turn.
    """

    def __init__(
        self,
        config: GroundingConfig,
        spec: LMSpec,
        vision: VisionEncoder,
        tokenizer: Any,
        max_length: int | None,
        provenance: Mapping[str, str | None],
    ) -> None:
        super().__init__()
        self.config, self.spec, self.vision = config, spec, vision
        self.recent_features = RecentFeatures(vision)
        self.processor = GroundingProcessor(tokenizer, config, spec.vocabulary, vision.preprocess, max_length)
        self.adapter = new_adapter(config, spec, vision)
        self.provenance = dict(provenance)
        self.metadata = AdapterMetadata(config, self.provenance, spec.fingerprint)
        self.anchors: Anchors | None = None
        self.is_trainable = True
        self.source: str | None = None
        self._reference_features: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the adapter is."""
        return torch.device(self.adapter.logit_scale.device)

    def image_tokens(self, pixel_values: Tensor | None = None, image_features: Tensor | None = None) -> Tensor | None:
        """Return the input embeddings (n * k, d) of images, or None if there are none.

        Args:
            pixel_values: (n, c, h, w).
            image_features: (n, f), instead of pixels.
        """
        if image_features is None and pixel_values is not None:
            image_features = self.vision(pixel_values)
        return None if image_features is None else self.adapter.image_tokens(image_features.to(self.device))

    def prompt_image_tokens(self, pixel_values: Tensor | None) -> Tensor | None:
        """Return the image tokens (n * k, d) of a prompt's pixels; images seen before are not encoded again."""
        return None if pixel_values is None else self.image_tokens(image_features=self.recent_features(pixel_values))

    @torch.no_grad()
    def embed_images(
        self,
        images: Images = (),
        image_features: Tensor | None = None,
        batch_size: int = 32,
    ) -> Tensor:
        """Map images, or their features (n, f), to unit vectors (n, q); `batch_size` images are encoded at once."""
        features = self.vision.encode(images, batch_size) if image_features is None else image_features
        return self.adapter.embed_images(features.to(self.device))

    @property
    def image_space(self) -> ImageSpace:
        """Which vectors it gives to images; an index keeps this, to know the adapters that it can be used with."""
        if self._reference_features is None:
            self._reference_features = self.vision.encode(reference_pictures())
        vectors = self.embed_images(image_features=self._reference_features)
        return ImageSpace.of(vectors, self.vision.name, self.source)

    def embed_states(self, states: list[Tensor]) -> Tensor:
        """Map hidden states that were read for retrieval, one (r, width) per text layer, to unit vectors (r, q).

        They are read at the last word of the retrieval prompt, or at `[RET]` if that prompt is empty.
        """
        return self.adapter.embed_states([state.to(self.device) for state in states])

    @property
    def report(self) -> Report:
        """How the adapter was made and what was measured; saved with it, and shown on its card."""
        return self.metadata.report

    @report.setter
    def report(self, report: Report) -> None:
        self.metadata = replace(self.metadata, report=report)

    @property
    def image_processor(self) -> Any:
        """Maps a list of PIL images to `{"pixel_values": (n, c, h, w)}`."""
        return self.vision.image_processor

    def record_training(self, settings: Mapping[str, Any]) -> None:
        """Record that the adapter was trained here, and how: from now on its metadata name this LM and encoder."""
        report = replace(self.report, training=dict(settings), evaluations=(), samples=(), picture=None)
        self.metadata = AdapterMetadata(self.config, self.provenance, self.spec.fingerprint, report)

    def keep_encoder_name(self) -> None:
        """Record the name that the encoder was loaded by, if the adapter was saved with none or another."""
        if self.vision.name not in (None, self.metadata.provenance.get("vision_encoder")):
            encoder = {name: self.provenance.get(name) for name in ("vision_encoder", "vision_revision")}
            self.metadata = replace(self.metadata, provenance={**self.metadata.provenance, **encoder})

    def load_weights(self, folder: str | os.PathLike[str], lm: nn.Module) -> None:
        """Load a folder's tensors, and those of the LM's PEFT adapter if that is trained together with this one.

        Raises:
            GroundingFileError: missing or damaged; nothing has changed then.
            GroundingValueError: other names, shapes or dtypes; each is listed, and nothing has changed.
        """
        state = self.adapter.state_dict()
        tensors = read_tensors(Path(folder) / WEIGHTS_FILE, state, NEWER)
        missing = {name: torch.zeros_like(state[name]) for name in state if name not in tensors}
        if self.config.train_lm_adapter:
            lm_peft.load_into(lm, folder)
        self.adapter.load_state_dict({**missing, **tensors})

    def save(self, folder: str | os.PathLike[str], lm: nn.Module) -> None:
        """Write the adapter's folder, see `GroundedModel.save_pretrained`; `lm` is the LM that it is on."""
        self._write(folder, lm, self.metadata)
        self.source = os.fspath(folder)

    def push(self, repo_id: str, lm: nn.Module, options: PushOptions) -> str:
        """Commit the adapter's folder to the Hub, see `GroundedModel.push_to_hub`."""
        metadata = published(self.metadata)
        return push_folder(lambda folder: self._write(folder, lm, metadata, repo_id), repo_id, options, FILES)

    def _write(
        self, folder: str | os.PathLike[str], lm: nn.Module, metadata: AdapterMetadata, repo_id: str | None = None
    ) -> None:
        beside = lm_peft.writers(lm) if self.config.train_lm_adapter else {}
        if self.anchors is not None:
            beside = {**beside, ANCHORS_FILE: self.anchors.write}
        # The file is in float32, also if somebody called `adapter.double()`.
        tensors = {name: tensor.float() for name, tensor in self.adapter.state_dict().items()}
        if broken := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
            raise GroundingValueError(
                f"{broken} of the adapter hold numbers that are not finite, and could not be loaded again. Nothing is "
                "written; take the last state that was saved, and a lower learning rate."
            )
        metadata = replace(metadata, kept=tuple(sorted(self.adapter.kept)))
        save_adapter(folder, tensors, metadata, repo_id, beside=beside)


def new_adapter(config: GroundingConfig, spec: LMSpec, vision: VisionEncoder) -> Adapter:
    """Return an adapter of the widths that fit an LM and an encoder."""
    ends = spec.text_dims, spec.head_dim, spec.tied and config.tied_ret
    return Adapter(config, spec.embedding_dim, vision.feature_dim, *ends, vision.patch_dim)
