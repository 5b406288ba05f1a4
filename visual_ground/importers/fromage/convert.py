"""Official FROMAGe checkpoints become adapter folders, and their image embeddings image indexes.

An official folder holds `model_args.json`, `pretrained_ckpt.pth.tar` and, for retrieval, `cc3m_embeddings*.pkl`. The
checkpoint comes in two layouts: as the official pruning script writes it, with the whole input embedding and the
embedding of `[RET]` (1, d); and as released, with the embedding of `[RET]` (d,) alone. Both are read by torch's
weights-only unpickler, and the image embeddings by one that knows nothing but arrays of floats.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visual_ground.adapter.files import save_adapter
from visual_ground.adapter.metadata import AdapterMetadata
from visual_ground.config import GroundingConfig
from visual_ground.errors import GroundingFileError, GroundingValueError
from visual_ground.importers.fromage.unpickler import read_lists
from visual_ground.index.image_index import ImageIndex

ARGS_FILE = "model_args.json"
CHECKPOINT_FILE = "pretrained_ckpt.pth.tar"
EMBEDDINGS_FILES = "cc3m_embeddings*.pkl"
# A model trained with one of these computes something that an adapter cannot.
UNSUPPORTED = {"use_image_embed_norm": True, "use_text_embed_layernorm": True, "freeze_lm": False, "freeze_vm": False}
RET_KEY = "ret_input_embeddings.weight"
EMBEDDING_KEY = "model.input_embeddings.weight"


@dataclass(frozen=True)
class OfficialModel:
    """The content of an official checkpoint, in the terms of this package.

    Args:
        config: the published settings with the checkpoint's shapes.
        tensors: the adapter's state dict.
        lm: the name of its language model.
        vision: the name of its vision tower, as `ground` takes it.
    """

    config: GroundingConfig
    tensors: dict[str, Tensor]
    lm: str
    vision: str

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write an adapter folder, as `GroundedModel.save_pretrained` does."""
        provenance = {"base_model_name_or_path": self.lm, "vision_encoder": self.vision}
        save_adapter(folder, self.tensors, AdapterMetadata(self.config, provenance))


def read_official(folder: str | os.PathLike[str], checkpoint: str | os.PathLike[str] | None = None) -> OfficialModel:
    """Read an official checkpoint of either layout.

    Args:
        folder: holds `model_args.json` and the checkpoint.
        checkpoint: the checkpoint's path, if it is not `pretrained_ckpt.pth.tar` in the folder.

    Raises:
        GroundingFileError: a file that is missing, damaged, or holds more than tensors.
        GroundingValueError: settings that an adapter cannot have, or tensors that are missing, unexpected or misshapen,
            each by name.

    Example:
        >>> read_official("fromage_model").save("adapter")  # doctest: +SKIP
    """
    folder = Path(folder)
    args = _read_args(folder / ARGS_FILE)
    config = GroundingConfig.preset(
        "fromage",
        num_visual_tokens=args["n_visual_tokens"],
        retrieval_dim=args["shared_emb_dim"],
        text_layers=tuple(args["text_emb_layers"]),
    )
    stored = _read_tensors(folder / CHECKPOINT_FILE if checkpoint is None else Path(checkpoint))
    # The official encoder is the tower inside CLIP, before its projection.
    vision = f"{args['visual_encoder']}#vision_model"
    return OfficialModel(config, _translate(stored, config), args["opt_version"], vision)


def read_official_index(folder: str | os.PathLike[str]) -> ImageIndex | None:
    """Read the pickled image embeddings of an official folder, or return None if it has none.

    Returns:
        An index whose ids are the images' numbers in the files, in the files' order, and whose images are the
        references (mostly addresses) that the files name.

    Raises:
        GroundingFileError: a file that is damaged, or holds anything but paths and embeddings.
    """
    vectors: list[Tensor] = []
    images: list[str] = []
    for path in sorted(Path(folder).glob(EMBEDDINGS_FILES)):
        paths, embeddings = read_lists(path, ("paths", "embeddings"))
        names = [name for name in paths if isinstance(name, str)]
        flat = [vector for vector in embeddings if isinstance(vector, Tensor) and vector.dim() == 1]
        if not len(paths) == len(names) == len(embeddings) == len(flat):
            raise GroundingFileError(f"{path} does not hold one path for each embedding. Fetch it again.")
        images, vectors = [*images, *names], [*vectors, *flat]
        if len({len(vector) for vector in vectors}) > 1:
            raise GroundingFileError(f"{path} holds embeddings of several widths. Fetch it again.")
    if not vectors:
        return None
    return ImageIndex(torch.nn.functional.normalize(torch.stack(vectors), dim=-1), images=images)


def _read_args(path: Path) -> dict[str, Any]:
    try:
        args: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GroundingFileError(f"{path} cannot be read: {error}. Give a folder of the official model.") from error
    kinds = {"opt_version": str, "visual_encoder": str, "n_visual_tokens": int, "shared_emb_dim": int}
    kinds |= {"text_emb_layers": list}
    wrong = [name for name, kind in kinds.items() if not isinstance(args, dict) or type(args.get(name)) is not kind]
    if wrong or not all(type(layer) is int for layer in args["text_emb_layers"]):
        raise GroundingFileError(f"{path} has no usable {wrong or ['text_emb_layers']}. Fetch it again.")
    for name, value in UNSUPPORTED.items():
        if args.get(name, not value) == value:
            raise GroundingValueError(
                f"{path} has {name}={value}, which an adapter cannot be. Only models with {name}={not value} are read."
            )
    return args


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise GroundingFileError(f"{path} is missing. Give the checkpoint's path, or a folder that has it.")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged zip or pickle raises whatever it runs into
        raise GroundingFileError(f"{path} is damaged or holds more than tensors: {error}") from error
    stored = stored.get("state_dict") if isinstance(stored, Mapping) else None
    if not isinstance(stored, Mapping) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise GroundingFileError(f"{path} has no state_dict of tensors. Give an official checkpoint.")
    return {str(name).removeprefix("module."): value.float() for name, value in stored.items()}


def _official_names(config: GroundingConfig) -> dict[str, str]:
    """Map the adapter's parameter names to the checkpoint's."""
    pairs = {"image_projection": "model.visual_embeddings", "image_retrieval_projection": "model.visual_fc"}
    pairs |= {f"text_retrieval_projection.{i}": f"model.text_hidden_fcs.{i}.0" for i in range(len(config.text_layers))}
    names = {f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in pairs.items() for part in ("weight", "bias")}
    return {**names, "logit_scale": "model.logit_scale"}


def _translate(stored: Mapping[str, Tensor], config: GroundingConfig) -> dict[str, Tensor]:
    """Return the adapter's state dict; the frozen models, if a checkpoint has them, are left out."""
    names = _official_names(config)
    needed = [*names.values(), RET_KEY]
    frozen = re.compile(r"model\.(lm|visual_model|input_embeddings)\.")
    wrong = [f"missing: {name}" for name in needed if name not in stored]
    wrong += [f"unexpected: {name}" for name in stored if name not in needed and not frozen.match(name)]
    if wrong:
        raise GroundingValueError("This is not an official checkpoint with these settings:\n  " + "\n  ".join(wrong))
    ret = stored[RET_KEY].flatten()
    tensors = {name: stored[official].clone() for name, official in names.items()}
    _check_shapes(tensors, len(ret), config)
    features = tensors["image_retrieval_projection.weight"].shape[1]
    tensors |= {"ret_input": ret.clone(), "ret_norms": _mean_norm(stored.get(EMBEDDING_KEY), ret).repeat(2)}
    for name, width in (("embedding", len(ret)), ("feature", features)):
        tensors |= {f"{name}_mean": torch.zeros(width), f"{name}_std": torch.ones(width)}
    return tensors


def _check_shapes(tensors: Mapping[str, Tensor], width: int, config: GroundingConfig) -> None:
    features = tensors["image_retrieval_projection.weight"].shape[-1]
    layers = {
        "image_projection": (config.num_visual_tokens * width, features),
        "image_retrieval_projection": (config.retrieval_dim, features),
    }
    for i in range(len(config.text_layers)):
        state_width = tensors[f"text_retrieval_projection.{i}.weight"].shape[-1]
        layers[f"text_retrieval_projection.{i}"] = (config.retrieval_dim, state_width)
    shapes: dict[str, tuple[int, ...]] = {"logit_scale": ()}
    for name, (outputs, inputs) in layers.items():
        shapes |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    wrong = [
        f"{name}: the checkpoint has {tuple(tensors[name].shape)}, its settings need {shape}"
        for name, shape in shapes.items()
        if tuple(tensors[name].shape) != shape
    ]
    if wrong:
        raise GroundingValueError("This checkpoint does not fit its model_args.json:\n  " + "\n  ".join(wrong))


def _mean_norm(embedding: Tensor | None, ret: Tensor) -> Tensor:
    """Return the norm at which training keeps `[RET]`: the mean norm of the other tokens.

    A released checkpoint lacks these, but the official training left `[RET]` itself at that norm.
    """
    if embedding is None or embedding.dim() != 2 or len(embedding) < 2:
        return ret.square().sum().sqrt()
    return embedding[:-1].square().sum(-1).sqrt().mean()
