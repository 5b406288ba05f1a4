"""`GroundedModel`: a frozen language model that reads images and shows them, made of parts that do the work."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from transformers import BatchFeature

from visual_ground.adapter.adapter import Adapter
from visual_ground.adapter.adapter_set import AdapterSet, OfActive
from visual_ground.adapter.attached import AttachedAdapter
from visual_ground.adapter.files import AdapterFiles
from visual_ground.adapter.initialization import initialize_from_lm
from visual_ground.components import Components, components_beside, load_saved_components
from visual_ground.config import GroundingConfig
from visual_ground.errors import GroundingValueError
from visual_ground.generation.generate import generate
from visual_ground.generation.output import InterleavedOutput, Part
from visual_ground.generation.retrieval_token import RetrievalSettings
from visual_ground.generation.stream import generate_seeing, stream
from visual_ground.index.base import RetrievalIndex
from visual_ground.lm.frozen_lm import FrozenLM
from visual_ground.prompts.processor import GroundingProcessor
from visual_ground.prompts.types import Prompts
from visual_ground.scoring.prompts import embed_prompts, log_likelihood
from visual_ground.storage.hub import HubOptions, PushOptions
from visual_ground.vision.encoder import VisionEncoder
from visual_ground.vision.identity import ImageSpace
from visual_ground.vision.images import Images


class GroundedModel(nn.Module):
    """A frozen LM, a frozen vision encoder, and the adapter between them; made by `ground` or `from_pretrained`.

    Attributes:
        lm: the transformers model.
        tokenizer: its tokenizer.
        ret_token_id: the id of `[RET]`.
        adapter: what is trained. This and what follows belong to the active adapter.
        vision: the frozen vision encoder.
        image_processor: maps a list of PIL images to `{'pixel_values': (n, c, h, w)}`.
        processor: turns prompts into ids and pixels.
        config: the adapter's settings.
        image_space: the space of the adapter's image vectors; an `ImageIndex` built in another space is refused.
    """

    adapter, vision, processor = OfActive[Adapter](), OfActive[VisionEncoder](), OfActive[GroundingProcessor]()
    image_processor, config, image_space = OfActive[Any](), OfActive[GroundingConfig](), OfActive[ImageSpace]()

    def __init__(self, components: Components, config: GroundingConfig) -> None:
        super().__init__()
        self.lm, self.tokenizer, spec = components.lm, components.tokenizer, components.spec
        self.ret_token_id, self.adapters = spec.vocabulary.ret_token_id, AdapterSet()
        active = self.adapters.ret_embeddings, self.adapters.masks_spare_columns
        self.frozen_lm = FrozenLM(self.lm, spec, *active, config.train_lm_adapter)
        self._attach(self.adapters.active_name, config, components)

    def _attach(self, name: str, config: GroundingConfig, parts: Components) -> AttachedAdapter:
        own = self.tokenizer, self.frozen_lm.max_length, parts.provenance
        attached = self.adapters.add(name, AttachedAdapter(config, parts.spec, parts.vision, *own))
        attached.adapter.to(self.frozen_lm.device)
        return attached

    @property
    def active_adapter(self) -> str:
        """The name of the adapter in use."""
        return self.adapters.active_name

    @property
    def active(self) -> AttachedAdapter:
        """The active adapter with all that belongs to it: processor, metadata, report, anchors."""
        return self.adapters.active

    def prepare(self, prompts: Prompts, padding_side: str = "left") -> BatchFeature:
        """Return what `forward` reads: input_ids and attention_mask (b, s), and images as pixel_values (n, c, h, w).

        Args:
            prompts: a list of prompts, each a string, an image in any form, a list mixing them, or a list of chat
                messages; or one string, image or chat alone. One interleaved prompt is a list within the list.
            padding_side: "left" or "right".
        """
        return self.processor(prompts, padding_side).to(self.frozen_lm.device)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        **lm_options: Any,
    ) -> Any:
        """Run the LM over what `prepare` gives; return the LM's own output, with logits (b, s, columns).

        Args:
            input_ids: (b, s).
            attention_mask: (b, s).
            pixel_values: (n, c, h, w), the images of the whole batch in order.
            image_features: (n, f), instead of pixels.
            lm_options: any other argument of the LM's forward, except labels: losses come from `GroundingTrainer`.
        """
        if "labels" in lm_options:
            raise GroundingValueError("forward takes no labels; the losses come from GroundingTrainer.")
        image_tokens = self.active.image_tokens(pixel_values, image_features)
        return self.frozen_lm.forward(input_ids, attention_mask, image_tokens, **lm_options)

    def embed_images(self, images: Images = (), image_features: Tensor | None = None, batch_size: int = 32) -> Tensor:
        """Map PIL images or paths, `batch_size` at once, or features (n, f), to unit vectors (n, q) for retrieval."""
        return self.active.embed_images(images, image_features, batch_size)

    def embed_text(self, prompts: Prompts) -> Tensor:
        """Map prompts to unit vectors (n, q), read after the retrieval prompt; strings are encoded as in training."""
        return embed_prompts(self.frozen_lm, self.active, prompts)

    def log_likelihood(self, prompts: Prompts, continuations: Sequence[str]) -> Tensor:
        """Return log p(continuation | prompt), (n,), in nats, by the logits of `forward`; `[RET]` may be in either."""
        return log_likelihood(self.frozen_lm, self.active, prompts, continuations)

    def generate(
        self, prompts: Prompts, index: RetrievalIndex | None = None, max_new_tokens: int | None = None, **options: Any
    ) -> list[InterleavedOutput]:
        """Answer prompts with text and retrieved images; return, in order, one output for each prompt.

        Args:
            prompts: as in `prepare`.
            index: where images are searched; None: the answer only marks where an image belongs.
            max_new_tokens: the most tokens, `[RET]`s included; None: what the generation config says, or else 64.
            options: fields of `RetrievalSettings` (`see_images` and others), and any of transformers' `generate`; with
                `num_return_sequences`, each prompt has as many outputs.
        """
        settings, options = RetrievalSettings.take_from(options), {"max_new_tokens": max_new_tokens, **options}
        given = self.frozen_lm, self.active, self.prepare(prompts), index, settings, options
        return generate_seeing(*given) if settings.see_images else generate(*given)

    def stream(self, prompts: Prompts, index: RetrievalIndex | None = None, **options: Any) -> Iterator[Part]:
        """Answer one prompt; yield texts and images as they are generated. Arguments are those of `generate`."""
        return stream(self.frozen_lm, self.active, self.prepare(prompts), index, options)

    def add_adapter(
        self, adapter_name: str, config: GroundingConfig | None = None, vision_encoder: Any = None, **given: Any
    ) -> None:
        """Put a new adapter beside the others; `image_processor` may be given; arguments as in `ground`."""
        config = GroundingConfig() if config is None else config
        self.adapters.check_new(adapter_name, config)
        vision = self.vision if vision_encoder is None else vision_encoder
        parts = components_beside(self.frozen_lm, self.active, config, vision, **given)
        initialize_from_lm(self._attach(adapter_name, config, parts).adapter, self.frozen_lm)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        vision_encoder: Any = None,
        image_processor: Any = None,
        is_trainable: bool = False,
        **hub_options: Any,
    ) -> None:
        """Put a saved adapter beside the others; the arguments, and what is raised, are as in `from_pretrained`."""
        files = AdapterFiles.open(model_id, HubOptions.of(hub_options))
        self.adapters.check_new(adapter_name, files.config)
        shared = vision_encoder is None and files.provenance.get("vision_encoder") in (None, self.vision.name)
        vision = self.vision if shared else vision_encoder
        parts = components_beside(self.frozen_lm, self.active, files.config, vision, image_processor, files)
        self._attach(adapter_name, files.config, parts)
        self.adapters.load(adapter_name, files, is_trainable, self.lm)

    def set_adapter(self, adapter_name: str) -> None:
        """Use, train and save this adapter from now on; the others stay loaded."""
        self.adapters.set(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, which must not be the active one."""
        self.adapters.delete(adapter_name)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Return a context manager, inside which the LM behaves as if it had never been grounded."""
        return self.frozen_lm.disabled()

    def unground(self) -> nn.Module:
        """Take everything off the LM and hand it back; its own weights are bit for bit what they were."""
        self.adapters.release()
        return self.frozen_lm.release()

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the counts of trainable and of all parameters, as PEFT does."""
        parameters = list(self.parameters())
        return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)

    def print_trainable_parameters(self) -> None:
        """Print both counts and their ratio, as PEFT does."""
        count, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {count:,d} || all params: {total:,d} || trainable%: {100 * count / total:.4f}")

    def train(self, mode: bool = True) -> GroundedModel:
        """Set the adapter's mode; the frozen parts stay in evaluation mode."""
        super().train(mode)
        for frozen in (self.lm, *(self.adapters[name].vision for name in self.adapters)):
            frozen.eval()
        return self

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the active adapter's folder, whole or not at all; the network is never used. See docs/adapters.md."""
        self.active.save(folder, self.lm)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Push the adapter's files to the Hub in one commit, without names of local models; return its address.

        `repo_id` is made if it is new; `options` are private, revision, token, commit_message and create_pr.
        """
        return self.active.push(repo_id, self.lm, PushOptions(**options))

    @classmethod
    def from_pretrained(
        cls,
        lm: str | nn.Module,
        model_id: str | os.PathLike[str] | None = None,
        vision_encoder: Any = None,
        tokenizer: Any = None,
        image_processor: Any = None,
        is_trainable: bool = False,
        **hub_options: Any,
    ) -> GroundedModel:
        """Ground an LM with a saved adapter, or load an adapter with the LM that it names.

        Args:
            lm: as in `ground`; or, if `model_id` is None, the adapter, which names the LM to load.
            model_id: local folder or Hub id of the adapter.
            vision_encoder: needed only if the adapter names none that can be loaded; by default the one that it names.
            tokenizer: as in `ground`.
            image_processor: as in `ground`.
            is_trainable: False freezes the adapter too.
            hub_options: revision, subfolder, token, cache_dir, local_files_only; see `HubOptions`.

        Raises:
            GroundingFileError: no such adapter, or a damaged one, or one that names models that cannot be loaded.
            GroundingValueError: another format version, or an adapter for other widths, listed with both shapes.
        """
        given = lm, model_id, vision_encoder, tokenizer, image_processor
        parts, files = load_saved_components(*given, HubOptions.of(hub_options))
        model = cls(parts, files.config)
        try:
            model.adapters.load(model.adapters.active_name, files, is_trainable, model.lm)
        except BaseException:
            model.unground()
            raise
        return model.train(is_trainable)
