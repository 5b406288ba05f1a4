"""Language models: loading one, refusing what is none, and reading the few facts that grounding needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visual_ground.errors import GroundingFileError, GroundingTypeError, GroundingValueError
from visual_ground.fingerprint import SAMPLED_ROWS, Fingerprint, spread
from visual_ground.virtual_rows import VirtualVocabulary

CHUNK = 512


@dataclass(frozen=True)
class LanguageFacts:
    """What grounding needs to know of a language model.

    Args:
        embedding_dim: d, width of its input embedding's output.
        head_dim: h, width of what its output head reads.
        text_dims: widths of the hidden states named by `text_layers`.
        tied: whether a row that goes in is the row that comes out: one weight, and no scaling inside the embedding.
        vocabulary: whose ids are whose.
        fingerprint: by which the LM is known again; None where its weights are not there yet.
    """

    embedding_dim: int
    head_dim: int
    text_dims: tuple[int, ...]
    tied: bool
    vocabulary: VirtualVocabulary
    fingerprint: Fingerprint | None = None


def load_language_model(
    lm: str | nn.Module, tokenizer: Any = None, revision: str | None = None, **hub: Any
) -> tuple[nn.Module, Any]:
    """Load a causal LM and its tokenizer, or check those given. Code that comes with a model is never run.

    Args:
        lm: Hub id, local folder, or a loaded model (also a `PeftModel`).
        tokenizer: a tokenizer or its name; found by the LM's name where None.
        revision: of a Hub id.
        hub: token, cache_dir and local_files_only, for transformers' `from_pretrained`.

    Raises:
        GroundingFileError: no LM can be loaded by that name.
        GroundingTypeError: not a causal LM.
        GroundingValueError: no tokenizer can be found.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"revision": revision, "trust_remote_code": False, **hub}
    if isinstance(lm, str):
        tokenizer = lm if tokenizer is None else tokenizer
        try:
            lm = AutoModelForCausalLM.from_pretrained(lm, **options)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise GroundingFileError(f"The language model {lm!r} cannot be loaded: {error}") from error
    check_causal_lm(lm)
    source = tokenizer if tokenizer is not None else getattr(lm.config, "_name_or_path", "")
    if not source:
        raise GroundingValueError(f"{type(lm).__name__} names no tokenizer; pass tokenizer=.")
    if not isinstance(source, str):
        return lm, source
    try:
        return lm, AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise GroundingValueError(f"No tokenizer was found at {source!r}; pass tokenizer=. ({error})") from error


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
    """Read a language model's widths, ties, ids and fingerprint, by running two tokens through it.

    Args:
        lm: a causal LM.
        tokenizer: its tokenizer.
        text_layers: as in `GroundingConfig`.

    Raises:
        GroundingValueError: a text layer that the LM does not have.
    """
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    words, reserved = tokenizer.get_vocab(), _reserved_ids(lm, tokenizer)
    num_rows = getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0]
    count = min(num_rows, max(words.values()) + 1)
    # Two different words, so that attention has a say in the fingerprint; special tokens may ask for more than ids.
    plain = [i for i in range(1, count) if i not in reserved] or [0]
    ids = torch.tensor([[plain[len(plain) // 3], plain[2 * len(plain) // 3]]], device=embedding_device(lm))
    frozen = Frozen(lm)
    try:
        sampled = embedding(torch.tensor([spread(count, SAMPLED_ROWS)], device=ids.device))[0]
        embedded, head_input, logits, states = _run(lm, ids, any(layer != -1 for layer in text_layers))
    finally:
        frozen.restore()
    for layer in text_layers:
        if layer != -1 and not -len(states) <= layer < len(states):
            raise GroundingValueError(f"text layer {layer} does not exist: the LM has {len(states)} hidden states.")
    return LanguageFacts(
        embedding_dim=embedded.shape[-1],
        head_dim=head_input.shape[-1],
        text_dims=tuple(head_input.shape[-1] if layer == -1 else states[layer].shape[-1] for layer in text_layers),
        tied=_is_tied(embedding, head, embedded, ids),
        vocabulary=VirtualVocabulary(num_rows, logits.shape[-1], max(words.values()) + 1, reserved),
        fingerprint=None if head_input.is_meta else Fingerprint.of(words, sampled, head_input.flatten(0, -2)[-1]),
    )


def _reserved_ids(lm: nn.Module, tokenizer: Any) -> frozenset[int]:
    kinds = ("pad", "bos", "eos", "image", "video", "audio")
    named = {getattr(lm.config, f"{kind}_token_id", None) for kind in kinds}
    return frozenset(i for i in named | set(tokenizer.all_special_ids) if isinstance(i, int))


def _run(lm: nn.Module, ids: Tensor, hidden_states: bool) -> tuple[Tensor, Tensor, Tensor, Sequence[Tensor]]:
    """Run ids (1, s); return the embedding's output, what the head reads, the logits, and any hidden states."""
    seen: list[Tensor] = []
    handles = [
        lm.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output)),
        lm.get_output_embeddings().register_forward_hook(lambda module, args, out: seen.extend([args[0], out])),
    ]
    try:
        # Asked for only where needed: transformers leaves hooks of its own on an LM that was asked for hidden states.
        output = lm(input_ids=ids, output_hidden_states=hidden_states)
    finally:
        for handle in handles:
            handle.remove()
    return seen[0], seen[-2], seen[-1], getattr(output, "hidden_states", None) or ()


def embedding_device(lm: nn.Module) -> torch.device:
    """Return the device that input ids should be on."""
    return getattr(lm.get_input_embeddings().weight, "device", torch.device("cpu"))


def _is_tied(embedding: nn.Module, head: nn.Module, embedded: Tensor, ids: Tensor) -> bool:
    rows, columns = getattr(embedding, "weight", None), getattr(head, "weight", None)
    if rows is None or columns is None or rows.device.type == "meta" or rows.data_ptr() != columns.data_ptr():
        return False
    return torch.equal(embedded[0, 0], rows[ids[0, 0]].to(embedded))


@torch.no_grad()
def embedding_rows(lm: nn.Module, count: int) -> Iterator[Tensor]:
    """Yield the embedding module's outputs for ids 0 to count - 1, in chunks (rows, d)."""
    embedding, device = lm.get_input_embeddings(), embedding_device(lm)
    for start in range(0, count, CHUNK):
        yield embedding(torch.arange(start, min(start + CHUNK, count), device=device).unsqueeze(0))[0]


@torch.no_grad()
def head_rows(lm: nn.Module, count: int, head_dim: int) -> Iterator[Tensor]:
    """Yield the output head's first `count` rows, in chunks (rows, h); a quantised head is read through the module."""
    head = lm.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is None or not weight.is_floating_point() or weight.dim() != 2 or weight.shape[1] != head_dim:
        device = embedding_device(lm)
        zero = torch.zeros(1, 1, head_dim, device=device)
        eye = torch.eye(head_dim, device=device).unsqueeze(0)
        weight = (head(eye) - head(zero))[0].T
    yield from weight[:count].split(CHUNK)


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
        self._parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        self._training = [part for module in modules for part in module.modules() if part.training]
        for module in modules:
            module.requires_grad_(False).eval()

    def restore(self) -> None:
        """Set every parameter and module back to what it was."""
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        for module in self._training:
            module.training = True
        self._parameters, self._training = [], []
