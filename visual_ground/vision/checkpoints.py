"""Encoders of timm and open_clip by name, with weights of the Hub or from files and folders of one's own.

| name | weights |
|---|---|
| `timm:ARCHITECTURE` | timm's own, from the Hub |
| `timm:ARCHITECTURE/FILE` | a `.safetensors`, `.pth`, `.pt` or `.bin` file |
| `timm:FOLDER` | a folder as timm saves it, with `config.json` |
| `open_clip:ARCHITECTURE/TAG` | open_clip's own, from the Hub |
| `open_clip:ARCHITECTURE/FILE` | a file |
| `open_clip:FOLDER` | a folder as open_clip saves it, with `open_clip_config.json` |

An absolute path follows the slash: `timm:vit_tiny_patch16_224//home/me/vit.safetensors`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from torch import nn

from visual_ground.errors import GroundingError, GroundingFileError, GroundingValueError
from visual_ground.vision.preprocessing import TransformProcessor


def load_timm(name: str) -> nn.Module:
    """Load an encoder of timm, by the name that follows "timm:", without its classifier.

    Raises:
        GroundingFileError: the weights cannot be had, or are of another architecture.
        GroundingValueError: timm knows no such architecture.
    """
    import timm

    options: dict[str, Any] = {"pretrained": True, "num_classes": 0}
    if os.path.isdir(name):
        name = f"local-dir:{name}"
    if os.path.isabs(name):
        raise GroundingFileError(f"There is no folder {name!r} to load the vision encoder from. Has it moved?")
    architecture, _, file = name.partition("/")
    if ":" not in architecture:
        if not timm.is_model(architecture):
            near = timm.list_models(f"*{architecture[:6]}*")[:5]
            raise GroundingValueError(
                f"timm knows no {architecture!r}, and it is no folder. Near are {near}; timm.list_models() names all."
            )
        if file:
            _check_file(file)
            name, options = architecture, {**options, "pretrained_cfg_overlay": {"file": file}}
    with _file_errors(f"timm:{name}", "timm:ARCHITECTURE/FILE or timm:FOLDER"):
        model: nn.Module = timm.create_model(name, **options)
    return model.eval()


def load_open_clip(name: str) -> tuple[nn.Module, Any]:
    """Load a model of open_clip, by the name that follows "open_clip:", and its preprocessing.

    Raises:
        GroundingFileError: the weights cannot be had, or are of another architecture.
        GroundingValueError: open_clip knows no such architecture, or the name has no weights in it.
    """
    import open_clip

    if os.path.isdir(name):
        name = f"local-dir:{name}"
    options: dict[str, Any] = {}
    if ":" not in name.partition("/")[0]:  # "hf-hub:owner/model" and "local-dir:folder" name their weights themselves.
        name, _, options["pretrained"] = (whole := name).partition("/")
        _check_open_clip(name, options["pretrained"])
    else:
        whole = name
    with _file_errors(f"open_clip:{whole}", "open_clip:ARCHITECTURE/FILE or open_clip:FOLDER"):
        model, _, transform = open_clip.create_model_and_transforms(name, **options)
    return model.eval(), TransformProcessor(transform)


def _check_open_clip(architecture: str, pretrained: str) -> None:
    """Raise GroundingError where open_clip has no such architecture, or no such weights, and no file has them."""
    import open_clip

    if architecture not in open_clip.list_models():
        raise GroundingValueError(
            f"open_clip knows no {architecture!r}; open_clip.list_models() names the {len(open_clip.list_models())} "
            "that it knows."
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not pretrained:
        raise GroundingValueError(
            f'"open_clip:{architecture}" names no weights. Write "open_clip:{architecture}/TAG" with one of {tags}, or '
            "the path of a file of weights for TAG; for random weights pass the model itself."
        )
    if pretrained not in tags:
        _check_file(pretrained)


def _check_file(path: str) -> None:
    if not os.path.isfile(path):
        raise GroundingFileError(f"There is no file {path!r} to load the vision encoder's weights from.")


@contextlib.contextmanager
def _file_errors(name: str, by_path: str) -> Iterator[None]:
    """Turn the many ways in which weights cannot be loaded into one error."""
    try:
        yield
    except GroundingError:
        raise
    # Without a network, with a damaged file, or with one of another architecture: each library has its own errors.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise GroundingFileError(
            f"The weights of {name} cannot be loaded: {type(error).__name__}: {reason}. Weights that you have on disk "
            f"are loaded by {by_path}."
        ) from error
