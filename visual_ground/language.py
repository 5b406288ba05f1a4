"""Language models: loading one, refusing what is none, and reading the few facts that grounding needs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visual_ground.errors import GroundingFileError, GroundingTypeError, GroundingValueError
from visual_ground.fingerprint import SAMPLED_ROWS, Fingerprint, spread
from visual_ground.language_weights import check_head, embedding_device, ends_are_tied
from visual_ground.vocabulary import VirtualVocabulary


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
        lm: Hub id, local folder, a GGUF file as a path or "owner/repository/file.gguf", or a loaded model (also a
            `PeftModel`).
        tokenizer: a tokenizer or its name; found by the LM's name where None.
        revision: of a Hub id.
        hub: token, cache_dir and local_files_only, for transformers' `from_pretrained`.

    Raises:
        GroundingFileError: no LM can be loaded by that name, or a path to a GGUF file that is not there.
        GroundingTypeError: not a causal LM.
        GroundingValueError: no tokenizer can be found.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"revision": revision, "trust_remote_code": False, **hub}
    if isinstance(lm, str):
        tokenizer = lm if tokenizer is None else tokenizer
        folder, file = _place(lm)
        try:
            lm = AutoModelForCausalLM.from_pretrained(folder, **options, **file)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise GroundingFileError(f"The language model {lm!r} cannot be loaded: {error}") from error
    check_causal_lm(lm)
    source = tokenizer if tokenizer is not None else getattr(lm.config, "_name_or_path", "")
    if not source:
        raise GroundingValueError(f"{type(lm).__name__} names no tokenizer; pass tokenizer=.")
    if not isinstance(source, str):
        return lm, source
    try:
        folder, file = _place(source)
        return lm, AutoTokenizer.from_pretrained(folder, **options, **file)
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
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    if embedding is None or head is None:
        raise GroundingTypeError(
            f"{name} has no language-model head over a vocabulary, as reward models and classifiers have none; load it "
            "with AutoModelForCausalLM."
        )
    if isinstance(embedding, nn.ModuleList) or isinstance(head, nn.ModuleList):
        raise GroundingTypeError(
            f"{name} reads or says several codebooks at once, as audio decoders do; grounding needs one stream of text."
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
    embedding = lm.get_input_embeddings()
    reserved = reserved_ids(lm.config) | frozenset(tokenizer.all_special_ids)
    words, num_rows = tokenizer.get_vocab(), getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0]
    count = min(num_rows, max(words.values()) + 1)
    # Two different words, so that attention has a say in the fingerprint; special tokens may ask for more than ids.
    plain = [i for i in range(1, count) if i not in reserved] or [0]
    ids = torch.tensor([[plain[len(plain) // 3], plain[2 * len(plain) // 3]]], device=embedding_device(lm))
    frozen = Frozen(lm)
    try:
        sampled = embedding(torch.tensor([spread(count, SAMPLED_ROWS)], device=ids.device))[0]
        # Asked for only where needed: transformers leaves hooks of its own on an LM that was asked for hidden states.
        embedded, head_input, output, widens = _run_once(lm, ids, any(layer != -1 for layer in text_layers))
    finally:
        frozen.restore()
    states = getattr(output, "hidden_states", None) or ()
    for layer in text_layers:
        if layer != -1 and not -len(states) <= layer < len(states):
            raise GroundingValueError(f"text layer {layer} does not exist: the LM has {len(states)} hidden states.")
    columns = output.logits.shape[-1] - widens
    return LanguageFacts(
        embedding_dim=embedded.shape[-1],
        head_dim=head_input.shape[-1],
        text_dims=tuple(head_input.shape[-1] if layer == -1 else states[layer].shape[-1] for layer in text_layers),
        tied=ends_are_tied(lm, embedded, ids),
        vocabulary=VirtualVocabulary(num_rows, columns, max(words.values()) + 1, reserved, widens=widens),
        fingerprint=None if head_input.is_meta else Fingerprint.of(words, sampled, head_input.flatten(0, -2)[-1]),
    )


def _run_once(lm: nn.Module, ids: Tensor, hidden_states: bool) -> tuple[Tensor, Tensor, Any, bool]:
    """Run ids (1, s) with one more column of logits.

    Returns:
        What the embedding gave (1, s, d), what the head read (1, s, h), the LM's output, and whether its logits have
        the column that was added.

    Raises:
        GroundingTypeError: an LM that does not make logits (1, s, v) of ids alone, through both of its ends.
    """
    seen: dict[str, Tensor] = {}

    def widen(module: nn.Module, args: tuple, logits: Tensor) -> Tensor:
        seen.update(head_input=args[0], head_output=logits)
        return nn.functional.pad(logits, (0, 1))

    handles = [
        lm.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.update(embedded=output)),
        lm.get_output_embeddings().register_forward_hook(widen),
    ]
    reason = "its logits are not one row over a vocabulary for each token"
    try:
        output = lm(input_ids=ids, output_hidden_states=hidden_states)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        output, reason = None, str(error).rstrip(".")
    finally:
        for handle in handles:
            handle.remove()
    logits = getattr(output, "logits", None)
    if len(seen) == 3 and isinstance(logits, Tensor) and logits.dim() == 3 and logits.shape[:2] == ids.shape:
        check_head(lm.get_output_embeddings(), seen["head_input"], seen["head_output"])
        widens = logits.shape[-1] == seen["head_output"].shape[-1] + 1
        return seen["embedded"], seen["head_input"], output, widens
    raise GroundingTypeError(
        f"{type(lm).__name__} does not make logits of token ids alone, as a causal language model does and a draft "
        f"head, which reads another model's states, does not. Its own words: {reason}."
    )


def reserved_ids(config: Any) -> frozenset[int]:
    """Return the ids to which a config, or one that it holds, gives a meaning: pad, bos, eos, placeholders and more."""
    ids: set[int] = set()
    for name, value in vars(config).items():
        if hasattr(value, "get_text_config"):
            ids |= reserved_ids(value)
        elif name.endswith(("_token_id", "_token_ids", "_token_index", "_index")):
            values = value if isinstance(value, (list, tuple)) else [value]
            ids |= {i for i in values if type(i) is int}
    return frozenset(ids)


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
