"""A frozen LM out of a pip package, and its states, fast: what texts share is run once, texts of a length together."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache

CACHE = Path(os.environ.get("RECIPE_CACHE", "demo/cache"))
FOLDERS = {"smollm2": "smollm2-135m-instruct", "gemma3": "gemma-3-270m"}
ROWS = 48

Ids = tuple[int, ...]


def load(name: str) -> tuple[nn.Module, Any]:
    """Load "smollm2" or "gemma3" in float32 with its tokenizer; see benchmarks/transfer/common.py for the folders."""
    folder = CACHE / FOLDERS[name]
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return lm.requires_grad_(False), AutoTokenizer.from_pretrained(folder)


def opening(tokenizer: Any) -> Ids:
    """Return what stands first in a sequence: the tokenizer's own opening, BOS or EOS."""
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    own = tuple(whole[: len(whole) - len(plain)]) if whole[-len(plain) :] == plain else ()
    return own or tuple(t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None)[:1]


class States:
    """Gives the last states of texts followed by each of several suffixes.

    Args:
        lm: a causal LM.
        ret_row: (d,), the input row of `[RET]`, which is the id -1.
    """

    def __init__(self, lm: nn.Module, ret_row: Tensor) -> None:
        self.lm, self.core = lm, lm.get_decoder() if hasattr(lm, "get_decoder") else lm.model
        self.table, self.ret_row = lm.get_input_embeddings(), ret_row

    def rows(self, ids: Tensor) -> Tensor:
        """Embed ids (b, s), -1 being `[RET]`."""
        rows = self.table(ids.clamp_min(0))
        return torch.where((ids == -1)[..., None], self.ret_row.to(rows), rows)

    @torch.no_grad()
    def __call__(self, texts: Sequence[Ids], suffixes: Sequence[Ids], keep: int = 2) -> list[Tensor]:
        """Return for each suffix the last `keep` states (n, keep, h) of every text with that suffix.

        A suffix may be empty: then the last of the texts' own states are returned.
        """
        texts = [tuple(text) for text in texts]
        found: list[list[Tensor | None]] = [[None] * len(texts) for _ in suffixes]
        shared = os.path.commonprefix(texts)
        shared = shared[: min(len(shared), min(map(len, texts)) - keep)] if len(shared) >= 4 else ()
        base = None
        if shared:
            base = DynamicCache()
            self.core(inputs_embeds=self.rows(torch.tensor([shared])), cache=base, use_cache=True)
        by_length = defaultdict(list)
        for i, text in enumerate(texts):
            by_length[len(text)].append(i)
        for _, places in sorted(by_length.items()):
            for start in range(0, len(places), ROWS):
                some = places[start : start + ROWS]
                cache = DynamicCache()
                if base is not None:
                    for n, layer in enumerate(base.layers):
                        shape = (len(some), -1, -1, -1)
                        cache.update(layer.keys.expand(shape), layer.values.expand(shape), n)
                ids = torch.tensor([texts[i][len(shared) :] for i in some])
                own = self.core(inputs_embeds=self.rows(ids), cache=cache, use_cache=True).last_hidden_state
                for results, suffix in zip(found, suffixes, strict=True):
                    if suffix:
                        tail = self.rows(torch.tensor([suffix]).expand(len(some), -1))
                        out = self.core(inputs_embeds=tail, cache=cache, use_cache=True).last_hidden_state
                        cache.crop(-len(suffix))
                        out = torch.cat([own, out], 1)[:, -keep:]
                    else:
                        out = own[:, -keep:]
                    for i, one in zip(some, out, strict=True):
                        results[i] = one.clone()
        return [torch.stack(results) for results in found]


class Kept:
    """States on disk, by name, computed where they are missing."""

    def __init__(self, folder: Path, states: States | None) -> None:
        self.folder, self.states = folder, states
        folder.mkdir(parents=True, exist_ok=True)
        self.seconds = 0.0

    def get(self, name: str, texts: Sequence[Ids], suffixes: dict[str, Ids], keep: int = 2) -> dict[str, Tensor]:
        """Return {suffix's name: (n, keep, h)}."""
        paths = {key: self.folder / f"{name}__{key}.pt" for key in suffixes}
        missing = [key for key, path in paths.items() if not path.exists()]
        if missing:
            start = time.perf_counter()
            for key, found in zip(missing, self.states(texts, [suffixes[k] for k in missing], keep), strict=True):
                torch.save(found, paths[key])
            spent = time.perf_counter() - start
            self.seconds += spent
            print(f"{name}: {len(texts)} texts, {len(missing)} suffixes, {spent:.0f} s", flush=True)
        return {key: torch.load(path) for key, path in paths.items()}
