"""`MTEBEncoder`: a grounded model as the package mteb wants an encoder, for its image-text retrieval tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visual_ground.errors import GroundingTypeError, needing
from visual_ground.model import GroundedModel

TEXT, IMAGE = "text", "image"
# Of `mteb.types.BatchedInput`: what a grounded model cannot read.
OTHER_MODALITIES = ("audio", "video")


class MTEBEncoder:
    """Embeds what mteb's tasks ask for: texts, images, and texts with images.

    An image alone is embedded as the images of an index are, a text alone as a caption; an image with a text is read by
    the LM, the image first. It satisfies mteb's `EncoderProtocol`, so that `mteb.evaluate` takes it.

    Args:
        model: the grounded model.
        name: what results are filed under, "organisation/name".
        revision: of the adapter, for the same.

    Example:
        >>> results = mteb.evaluate(MTEBEncoder(model), mteb.get_task("Flickr30kT2IRetrieval"))  # doctest: +SKIP
    """

    def __init__(
        self, model: GroundedModel, name: str = "visual-ground/grounded-model", revision: str | None = None
    ) -> None:
        self.model, self.mteb_model_meta = model, _model_meta(model, name, revision)

    def encode(self, inputs: Iterable[Mapping[str, Any]], **kwargs: Any) -> np.ndarray:
        """Return unit vectors (n, q) of a data loader's rows, in order.

        Args:
            inputs: batches with `text`, `image`, or both; where rows differ, what a row lacks is None or "".
            kwargs: what mteb says of its task, all without effect here.

        Raises:
            GroundingTypeError: batches of other modalities, or a row with neither text nor image.
        """
        vectors = [self._encode(batch) for batch in inputs]
        return torch.cat(vectors).float().cpu().numpy() if vectors else np.empty((0, self.model.config.retrieval_dim))

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Return the cosines of all pairs, (n, m)."""
        return _matrix(embeddings1) @ _matrix(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Return the cosine of each pair, (n,)."""
        return (_matrix(embeddings1) * _matrix(embeddings2)).sum(-1)

    def _encode(self, batch: Mapping[str, Any]) -> Tensor:
        texts, images = batch.get(TEXT), batch.get(IMAGE)
        if (texts is None and images is None) or any(batch.get(other) is not None for other in OTHER_MODALITIES):
            raise GroundingTypeError(
                f"A grounded model reads text and images, and this task's batches have {sorted(batch)}. Choose a task "
                "whose modalities are text and image."
            )
        count = len(texts if texts is not None else images or ())
        rows = list(zip(texts or [None] * count, images or [None] * count, strict=True))
        kinds = [(bool(text), image is not None) for text, image in rows]
        if (False, False) in kinds:
            raise GroundingTypeError(f"Row {kinds.index((False, False))} of a batch has neither text nor image.")
        vectors = torch.empty(count, self.model.config.retrieval_dim)
        for kind in dict.fromkeys(kinds):
            chosen = [number for number, one in enumerate(kinds) if one == kind]
            vectors[chosen] = self._encode_alike([rows[number] for number in chosen], *kind).float().cpu()
        return vectors

    @torch.no_grad()
    def _encode_alike(self, rows: Sequence[tuple[Any, Any]], has_text: bool, has_image: bool) -> Tensor:
        if not has_text:
            return self.model.embed_images([image for _, image in rows])
        if not has_image:
            return self.model.embed_text([text for text, _ in rows])
        # Typed, as a text that looks like the path of an image would be taken for one.
        return self.model.embed_text([[image, {"type": "text", "text": f" {text}"}] for text, image in rows])


def _matrix(embeddings: Any) -> Tensor:
    tensor = torch.as_tensor(embeddings).float()
    return tensor[None] if tensor.dim() == 1 else tensor


def _model_meta(model: GroundedModel, name: str, revision: str | None) -> Any:
    with needing('mteb is not installed. Run pip install "visual-ground[mteb]".'):
        from mteb.models.model_meta import ModelMeta, ScoringFunction
    unknown = ("release_date", "memory_usage_mb", "license", "public_training_code", "public_training_data")
    return ModelMeta(
        loader=None,
        name=name,
        revision=revision,
        languages=None,
        n_parameters=model.get_nb_trainable_parameters()[1],
        max_tokens=model.frozen_lm.max_length,
        embed_dim=model.config.retrieval_dim,
        open_weights=True,
        framework=["PyTorch"],
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=False,
        training_datasets=None,
        modalities=["text", "image"],
        **dict.fromkeys(unknown),
    )
