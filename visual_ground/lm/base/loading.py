"""Loading a causal language model with its tokenizer, and refusing models of other kinds."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from visual_ground.errors import GroundingFileError, GroundingTypeError, GroundingValueError
from visual_ground.storage.hub_names import check_name


def multiplies_bfloat16(device: str = "cpu") -> bool:
    """Return whether a device has hardware instructions for bfloat16 products.

    An LM in bfloat16 then reads about twice as fast.
    """
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Older versions of torch do not say.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def load_lm(
    lm: str | nn.Module, tokenizer: Any = None, revision: str | None = None, dtype: Any = None, **hub: Any
) -> tuple[nn.Module, Any]:
    """Load a causal LM and its tokenizer, or check those given. Code that comes with a model is never run.

    Args:
        lm: Hub id, local folder, a GGUF file as a path or "owner/repository/file.gguf", or a loaded model (also a
            `PeftModel`).
        tokenizer: a tokenizer or its name; None: found by the LM's name.
        revision: of a Hub id.
        dtype: of the weights of an LM that is loaded here; None: the one that they were saved in.
        hub: token, cache_dir and local_files_only, for transformers' `from_pretrained`.

    Raises:
        GroundingFileError: no LM can be loaded by that name, or no GGUF file is at that path.
        GroundingTypeError: not a causal LM.
        GroundingValueError: no tokenizer can be found.
    """
    from transformers import AutoTokenizer

    options = {"revision": revision, "trust_remote_code": False, **hub}
    if isinstance(lm, str):
        tokenizer = lm if tokenizer is None else tokenizer
        lm = _load(lm, options if dtype is None else {**options, "dtype": dtype})
    check_causal_lm(lm)
    source = tokenizer if tokenizer is not None else getattr(lm.config, "_name_or_path", "")
    if not source:
        raise GroundingValueError(f"{type(lm).__name__} names no tokenizer; pass tokenizer=.")
    if not isinstance(source, str):
        return lm, source
    try:
        folder, file = _gguf_file(source)
        return lm, AutoTokenizer.from_pretrained(folder, **options, **file)
    except (OSError, ValueError) as error:
        raise GroundingValueError(f"No tokenizer was found at {source!r}; pass tokenizer=. ({error})") from error


def _load(name: str, options: dict[str, Any]) -> nn.Module:
    from transformers import AutoModelForCausalLM

    folder, file = _gguf_file(name)
    check_name(folder, "language model")
    try:
        lm: nn.Module = AutoModelForCausalLM.from_pretrained(folder, **options, **file)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise GroundingFileError(f"The language model {name!r} cannot be loaded: {error}") from error
    return lm


def _gguf_file(name: str) -> tuple[str, dict[str, str]]:
    """Split the name of a GGUF file into folder or Hub id and transformers' option for the file; others stay whole."""
    if not name.lower().endswith(".gguf"):
        return name, {}
    folder, file = os.path.split(name)
    if not os.path.isfile(name) and (os.path.isdir(folder) or folder.count("/") != 1):
        raise GroundingFileError(f"{name!r} is no file. Give the path of a GGUF file, or owner/repository/file.gguf.")
    return folder or ".", {"gguf_file": file}


def check_causal_lm(lm: Any) -> None:
    """Raise GroundingTypeError unless `lm` is a causal LM with one input embedding and one output head."""
    name = type(lm).__name__
    for method in ("generate", "get_input_embeddings", "get_output_embeddings"):
        if not callable(getattr(lm, method, None)):
            raise GroundingTypeError(f"{name} is not a causal language model: it has no {method}().")
    if getattr(lm.config, "is_encoder_decoder", False):
        raise GroundingTypeError(f"{name} is an encoder-decoder; grounding needs a decoder-only causal LM.")
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    if embedding is None or head is None:
        raise GroundingTypeError(
            f"{name} has no language-model head over a vocabulary, as reward models and classifiers have none; load it "
            "with AutoModelForCausalLM."
        )
    if isinstance(embedding, nn.ModuleList) or isinstance(head, nn.ModuleList):
        raise GroundingTypeError(
            f"{name} reads or predicts several codebooks at once, as audio decoders do; grounding needs one "
            "stream of text."
        )
