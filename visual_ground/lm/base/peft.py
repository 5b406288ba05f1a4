"""PEFT adapters inside an LM (LoRA and the like): trained together with ours where asked, and saved beside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from visual_ground.errors import GroundingFileError, GroundingValueError
from visual_ground.storage.atomic import resolve
from visual_ground.storage.tensors import CONFIG_FILE, WEIGHTS_FILE, read_tensors, write_tensors

FOLDER = "lm_adapter"


def base_model_of(lm: nn.Module) -> nn.Module:
    """Return the causal LM itself, inside a `PeftModel` or not; `generate` runs its forward, not the wrapper's."""
    unwrap = getattr(lm, "get_base_model", None)
    return unwrap() if callable(unwrap) else lm


def tuner_layers(lm: nn.Module) -> list[Any]:
    """Return the layers of an LM that PEFT has replaced; raise GroundingValueError where there are none."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in lm.modules() if isinstance(layer, BaseTunerLayer)]
    if not layers:
        raise GroundingValueError(
            "train_lm_adapter=True asks for an LM with a PEFT adapter in it, and this one has none. Make it with "
            "peft.get_peft_model(lm, LoraConfig(...)), or set train_lm_adapter=False."
        )
    return layers


def trained_parameters(lm: Any) -> list[nn.Parameter]:
    """Return the parameters of the LM's active PEFT adapter: those that `writers` writes."""
    written = {tensor.data_ptr() for tensor in _tensors(lm, _active(lm)).values()}
    return [parameter for parameter in lm.parameters() if parameter.data_ptr() in written]


def writers(lm: Any) -> dict[str, Callable[[Path], object]]:
    """Return, for each file of the LM's active PEFT adapter, a function that writes it."""
    name = _active(lm)
    return {
        f"{FOLDER}/{WEIGHTS_FILE}": lambda path: write_tensors(path, _tensors(lm, name)),
        f"{FOLDER}/{CONFIG_FILE}": lambda path: lm.peft_config[name].save_pretrained(str(path.parent)),
    }


def load_into(lm: Any, folder: str | os.PathLike[str]) -> None:
    """Load the PEFT adapter saved in an adapter's folder into an LM that has one of the same shape.

    Raises:
        GroundingFileError: no PEFT adapter was saved there, or it is damaged.
        GroundingValueError: other names, shapes or dtypes; each is listed.
    """
    from peft import set_peft_model_state_dict

    path, name = resolve(folder, f"{FOLDER}/{WEIGHTS_FILE}"), _active(lm)
    if not path.is_file():
        raise GroundingFileError(f"{path} is missing: this adapter was not saved with an LM adapter beside it.")
    set_peft_model_state_dict(lm, read_tensors(path, _tensors(lm, name)), adapter_name=name)


def attach(lm: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Put the PEFT adapter that was saved beside an adapter into an LM; an LM that has one is returned as it is."""
    if getattr(lm, "peft_config", None):
        return lm
    from peft import PeftModel

    paths = [resolve(folder, f"{FOLDER}/{name}") for name in (CONFIG_FILE, WEIGHTS_FILE)]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise GroundingFileError(f"{missing} are missing: this adapter was not saved with an LM adapter beside it.")
    model: nn.Module = PeftModel.from_pretrained(lm, str(paths[0].parent))
    return model


def _active(lm: Any) -> str:
    name = lm.active_adapters() if callable(lm.active_adapters) else lm.active_adapters
    return name[0] if isinstance(name, (list, tuple)) else str(name)


def _tensors(lm: Any, name: str) -> Mapping[str, Tensor]:
    from peft import get_peft_model_state_dict

    tensors: Mapping[str, Tensor] = get_peft_model_state_dict(lm, adapter_name=name, save_embedding_layers=False)
    return tensors
