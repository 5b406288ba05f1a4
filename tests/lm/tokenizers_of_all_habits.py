"""Real tokenizers of every habit, trained here on a few lines: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertGenerationTokenizer, PreTrainedTokenizerFast

LINES = [
    "a photo of a red cat on a green mat",
    "two dogs run over the wet grass",
    "Image of a small boat: it is blue.",
    "Show me a picture, please. What is in it?",
    "12 apples and 7 pears lie on the table",
    "the sun sets over the old town",
]
# How tiktoken's vocabularies cut text before merging.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(
    special: tuple[str, ...] = ("<|endoftext|>",), prefix: bool = False, pieces: str | None = None, **names: Any
) -> PreTrainedTokenizerFast:
    """A byte-level BPE, as of GPT-2 or, with `pieces`, of tiktoken."""
    backend = Tokenizer(models.BPE(ignore_merges=pieces is not None))
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=pieces is None)
    cut = [] if pieces is None else [pre_tokenizers.Split(Regex(pieces), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cut, level])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def opened(tokenizer: PreTrainedTokenizerFast, bos: str) -> PreTrainedTokenizerFast:
    """Let a tokenizer put BOS before every text."""
    number = tokenizer.convert_tokens_to_ids(bos)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, number)]
    )
    return tokenizer


def metaspace(**names: Any) -> PreTrainedTokenizerFast:
    """A BPE that writes spaces as sentencepiece does, with one before every text, as of Llama 2."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_of_all = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=["<unk>", "<s>", "</s>", *bytes_of_all], show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **names)
    return opened(made, "<s>") if names.get("bos_token") else made


def sentence_pieces(folder: Path) -> BertGenerationTokenizer:
    """A real sentencepiece model, read by sentencepiece itself."""
    text = folder / "lines.txt"
    text.write_text("\n".join(LINES * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "pieces"),
        vocab_size=50,
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        minloglevel=2,
    )
    return BertGenerationTokenizer(vocab_file=str(folder / "pieces.model"))


EOS = dict(eos_token="<|endoftext|>")
LLAMA = dict(bos_token="<s>", eos_token="</s>")
HABITS: dict[str, Callable[[Path], Any]] = {
    "no bos, no pad": lambda folder: byte_level(**EOS),
    "no special token at all": lambda folder: byte_level(special=()),
    "bos is eos": lambda folder: byte_level(bos_token="<|endoftext|>", **EOS),
    "pad is eos": lambda folder: byte_level(pad_token="<|endoftext|>", **EOS),
    "pad is eos, left": lambda folder: byte_level(pad_token="<|endoftext|>", padding_side="left", **EOS),
    "pad is unk": lambda folder: metaspace(pad_token="<unk>", **LLAMA),
    "pad is unk, right": lambda folder: metaspace(pad_token="<unk>", padding_side="right", **LLAMA),
    "space before every text": lambda folder: byte_level(prefix=True, **EOS),
    "metaspace, bos by itself": lambda folder: metaspace(**LLAMA),
    "metaspace, no bos": lambda folder: metaspace(eos_token="</s>"),
    "sentencepiece": sentence_pieces,
    "tiktoken": lambda folder: opened(
        byte_level(special=("<|begin|>", "<|end|>"), pieces=PIECES, bos_token="<|begin|>", eos_token="<|end|>"),
        "<|begin|>",
    ),
}

_TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
_PROMPT = "{% if add_generation_prompt %}<assistant>{% endif %}"
TEMPLATES = {
    "system role": _TURNS + _PROMPT,
    "no system role": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + _TURNS
        + _PROMPT
    ),
    "bos by itself": "{{ bos_token }}" + _TURNS + _PROMPT,
}
