"""Language models: loading one, refusing what is none, and reading the few facts that grounding needs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visual_ground.errors import GroundingFileError, GroundingTypeError, GroundingValueError
from visual_ground.language_weights import check_head, embedding_device, ends_are_tied
from visual_ground.virtual_rows import VirtualVocabulary


@dataclass(frozen=True)
class LanguageFacts:
    """What grounding needs to know of a language model.

    Args:
        embedding_dim: d, width of its input embedding's output.
        head_dim: h, width of what its output head reads.
        text_dims: widths of the hidden states named by `text_layers`.
        tied: whether a row that goes in is the row that comes out: one weight, and no scaling inside the embedding.
        vocabulary: whose ids are whose.
    """

    embedding_dim: int
    head_dim: int
    text_dims: tuple[int, ...]
    tied: bool
    vocabulary: VirtualVocabulary


def load_language_model(
    lm: str | nn.Module, tokenizer: Any = None, revision: str | None = None
) -> tuple[nn.Module, Any]:
    """Load a causal LM and its tokenizer, or check those given.

    Args:
        lm: Hub id, local folder, a GGUF file as a path or "owner/repository/file.gguf", or a loaded model (also a
            `PeftModel`).
        tokenizer: a tokenizer or its name; found by the LM's name where None.
        revision: of a Hub id.

    Raises:
        GroundingTypeError: not a causal LM.
        GroundingValueError: no tokenizer can be found.
        GroundingFileError: a path to a GGUF file that is not there.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if isinstance(lm, str):
        tokenizer = lm if tokenizer is None else tokenizer
        folder, options = _place(lm)
        lm = AutoModelForCausalLM.from_pretrained(folder, revision=revision, **options)
    check_causal_lm(lm)
    source = tokenizer if tokenizer is not None else getattr(lm.config, "_name_or_path", "")
    if not source:
        raise GroundingValueError(f"{type(lm).__name__} names no tokenizer; pass tokenizer=.")
    if not isinstance(source, str):
        return lm, source
    try:
        folder, options = _place(source)
        return lm, AutoTokenizer.from_pretrained(folder, revision=revision, **options)
    except (OSError, ValueError) as error:
        raise GroundingValueError(f"No tokenizer was found at {source!r}; pass tokenizer=. ({error})") from error


def _place(name: str) -> tuple[str, dict[str, str]]:
    """Return the folder or Hub id of a name, and how to ask for the GGUF file in it where the name is of one."""
    if not name.lower().endswith(".gguf"):
        return name, {}
    folder, file = os.path.split(name)
    if not os.path.isfile(name) and (os.path.isdir(folder) or folder.count("/") != 1):
        raise GroundingFileError(f"{name!r} is no file. Give a GGUF file's path, or owner/repository/file.gguf.")
    return folder or ".", {"gguf_file": file}


def check_causal_lm(lm: Any) -> None:
    """Raise unless `lm` is a causal language model with both of its ends."""
    name = type(lm).__name__
    for method in ("generate", "get_input_embeddings", "get_output_embeddings"):
        if not callable(getattr(lm, method, None)):
            raise GroundingTypeError(f"{name} is not a causal language model: it has no {method}().")
    if getattr(lm.config, "is_encoder_decoder", False):
        raise GroundingTypeError(f"{name} is an encoder-decoder; grounding needs a decoder-only causal LM.")
    if lm.get_input_embeddings() is None or lm.get_output_embeddings() is None:
        raise GroundingTypeError(
            f"{name} has no language-model head over a vocabulary; load it with AutoModelForCausalLM."
        )


@torch.no_grad()
def read_facts(lm: nn.Module, tokenizer: Any, text_layers: tuple[int, ...]) -> LanguageFacts:
    """Read a language model's widths, ties and ids; runs one token through it where its config cannot tell.

    Args:
        lm: a causal LM.
        tokenizer: its tokenizer.
        text_layers: as in `GroundingConfig`.

    Raises:
        GroundingValueError: a text layer that the LM does not have.
    """
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    seen: list[Tensor] = []
    handles = [
        embedding.register_forward_hook(lambda module, args, output: seen.append(output)),
        head.register_forward_hook(lambda module, args, output: seen.extend([args[0], output])),
    ]
    ids = torch.ones((1, 2), dtype=torch.long, device=embedding_device(lm))
    try:
        # Asked for only where needed: transformers leaves hooks of its own on an LM that was asked for hidden states.
        output = lm(input_ids=ids, output_hidden_states=any(layer != -1 for layer in text_layers))
    finally:
        for handle in handles:
            handle.remove()
    embedded, head_input, logits = seen[0], seen[-2], seen[-1]
    check_head(head, head_input, logits)
    states = getattr(output, "hidden_states", None) or ()
    for layer in text_layers:
        if layer != -1 and not -len(states) <= layer < len(states):
            raise GroundingValueError(f"text layer {layer} does not exist: the LM has {len(states)} hidden states.")
    reserved = {
        getattr(lm.config, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos", "image", "video", "audio")
    }
    vocabulary = VirtualVocabulary(
        num_rows=getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0],
        num_columns=logits.shape[-1],
        num_tokens=max(tokenizer.get_vocab().values()) + 1,
        reserved_ids=frozenset(i for i in reserved | set(tokenizer.all_special_ids) if isinstance(i, int)),
    )
    return LanguageFacts(
        embedding_dim=embedded.shape[-1],
        head_dim=head_input.shape[-1],
        text_dims=tuple(head_input.shape[-1] if layer == -1 else states[layer].shape[-1] for layer in text_layers),
        tied=ends_are_tied(lm, embedded, ids),
        vocabulary=vocabulary,
    )


def core_of(lm: nn.Module) -> nn.Module:
    """Return the causal LM itself, inside a `PeftModel` or not; `generate` runs its forward, not the wrapper's."""
    unwrap = getattr(lm, "get_base_model", None)
    return unwrap() if callable(unwrap) else lm


class Frozen:
    """Frozen modules in evaluation mode, and what it takes to give them back as they were.

    Args:
        modules: the modules to freeze.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self._parameters: list[nn.Parameter] = []
        self._training: list[nn.Module] = []
        for module in modules:
            self.add(module)

    def add(self, module: nn.Module) -> None:
        """Freeze one more module."""
        self._parameters += [p for p in module.parameters() if p.requires_grad]
        self._training += [part for part in module.modules() if part.training]
        module.requires_grad_(False).eval()

    def restore(self) -> None:
        """Set every parameter and module back to what it was."""
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        for module in self._training:
            module.training = True
        self._parameters, self._training = [], []
