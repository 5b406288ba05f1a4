"""Compute and keep states: python compute.py LM bf16|fp32 FAMILY,FAMILY PROMPT,PROMPT (names of prompts.PROMPTS)."""

import sys

import torch
from data import Data, family
from lm import CACHE, Kept, States, load
from prompts import PROMPTS, suffix_ids


def kept(name: str, dtype: str, loaded: bool = True):
    lm, tokenizer = load(name) if loaded else (None, None)
    if loaded:
        row = lm.get_input_embeddings()(torch.arange(lm.config.vocab_size)).mean(0)
        lm = lm.to(torch.bfloat16) if dtype == "bf16" else lm
    return Kept(CACHE / "recipe" / f"{name}-{dtype}", States(lm, row) if loaded else None), tokenizer


if __name__ == "__main__":
    name, dtype, families, prompts = sys.argv[1:5]
    store, tokenizer = kept(name, dtype)
    data = Data(tokenizer)
    for one in families.split(","):
        chosen = prompts.split(",") if prompts != "all" else list(PROMPTS)
        suffixes = {p: (*suffix_ids(data, p, one), -1) for p in chosen}
        store.get(one, family(data, one), suffixes, keep=4)
