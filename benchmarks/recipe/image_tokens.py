"""Image tokens in closed form: what they are fitted to, how far they lie from the mean, how many there are."""

from __future__ import annotations

import math
import re
from collections import Counter
from itertools import chain
from typing import Any

import torch
from data import Data
from torch import Tensor
from transformers.cache_utils import DynamicCache

from visual_ground.demo import emoji
from visual_ground.training.initialization.idf import without_sentence_marks as within_a_sentence


class Captioner:
    """Runs captions after images' rows in a prompt."""

    def __init__(self, lm: Any, tokenizer: Any, data: Data, prompt: str = "Image of {image}:") -> None:
        self.lm, self.tokenizer, self.data = lm, tokenizer, data
        before, _, after = prompt.partition("{image}")
        self.before = torch.tensor([[*data.sink, *data.ids(before.rstrip())]])
        self.after = torch.tensor([data.ids(after)], dtype=torch.long)
        self.table = lm.get_input_embeddings()

    def _lead(self, rows: Tensor, cache: DynamicCache) -> Tensor:
        count = len(rows)
        embedded = [
            self.table(self.before).expand(count, -1, -1),
            rows.to(self.table.weight.dtype),
            self.table(self.after).expand(count, -1, -1),
        ]
        return self.lm.get_decoder()(
            inputs_embeds=torch.cat(embedded, 1), cache=cache, use_cache=True
        ).last_hidden_state[:, -1:]

    @torch.no_grad()
    def likelihoods(self, rows: Tensor, captions: list[str], images: list[int], texts: list[int]) -> Tensor:
        """Return the log likelihood of captions[texts[i]] after rows[images[i]], summed over tokens; rows (n, k, d)."""
        cache = DynamicCache()
        last = torch.cat([self._lead(rows[i : i + 64], c) for i, c in self._parts(rows, cache)])
        ids = [self.data.ids(" " + text) for text in captions]
        found = torch.zeros(len(images))
        by_length: dict[int, list[int]] = {}
        for n, text in enumerate(texts):
            by_length.setdefault(len(ids[text]), []).append(n)
        for places in by_length.values():
            for start in range(0, len(places), 48):
                some = places[start : start + 48]
                own = torch.tensor([images[n] for n in some])
                mine = DynamicCache()
                for n, layer in enumerate(cache.layers):
                    mine.update(layer.keys[own], layer.values[own], n)
                said = torch.tensor([ids[texts[n]] for n in some])
                read = last[own]
                if said.shape[1] > 1:
                    more = self.lm.get_decoder()(
                        inputs_embeds=self.table(said[:, :-1]), cache=mine, use_cache=True
                    ).last_hidden_state
                    read = torch.cat([read, more], 1)
                logits = self.lm.lm_head(read).float()
                own_logits = logits.gather(-1, said[..., None])[..., 0]
                found[torch.tensor(some)] = (own_logits - logits.logsumexp(-1)).sum(-1)
        return found

    def _parts(self, rows: Tensor, cache: DynamicCache):
        """Run leads in parts whose caches are joined along the batch."""
        kept: list[DynamicCache] = []
        for i in range(0, len(rows), 64):
            part = DynamicCache()
            kept.append(part)
            yield i, part
        for n in range(len(kept[0].layers)):
            keys = torch.cat([part.layers[n].keys for part in kept])
            values = torch.cat([part.layers[n].values for part in kept])
            cache.update(keys, values, n)

    @torch.no_grad()
    def captions(self, rows: Tensor, length: int = 16) -> list[str]:
        """Return greedy captions."""
        cache = DynamicCache()
        state = self._lead(rows, cache)
        said = []
        for _ in range(length):
            ids = self.lm.lm_head(state[:, -1]).argmax(-1, keepdim=True)
            said.append(ids)
            state = self.lm.get_decoder()(inputs_embeds=self.table(ids), cache=cache, use_cache=True).last_hidden_state
        return [self.tokenizer.decode(one) for one in torch.cat(said, 1)]


def pair_accuracy(captioner: Captioner, rows: Tensor, captions: list[str], wrong: int = 4, seed: int = 0) -> float:
    count = len(captions)
    draw = torch.Generator().manual_seed(seed)
    images, texts = list(range(count)), list(range(count))
    for _ in range(wrong):
        others = (torch.arange(count) + torch.randint(1, count, (count,), generator=draw)) % count
        images += others.tolist()
        texts += range(count)
    scores = captioner.likelihoods(rows, captions, images, texts).view(1 + wrong, count)
    return round(100 * float((scores[0] > scores[1:]).double().mean()), 1)


LIGHT = set("a an the of with and in on some face".split())


def names_said(concepts: list, captions: list[str]) -> tuple[float, float]:
    """Return in how many percent of captions a content word of the name is said, and a name's word or a keyword."""

    def stems(text: str) -> set[str]:
        return {word.rstrip("s") for word in re.findall(r"[a-z]+", text.lower())}

    name = keyword = 0
    for concept, caption in zip(concepts, captions, strict=True):
        said = stems(caption)
        own = stems(concept.name) - LIGHT
        name += bool(own & said)
        keyword += bool((own | stems(" ".join(concept.keywords))) & said)
    return round(100 * name / len(captions), 1), round(100 * keyword / len(captions), 1)


def word_targets(data: Data, table: Tensor, fitted: list[int], kinds: tuple[int, ...] = (0, 1)) -> Tensor:
    """Return for each concept the mean embedding of its captions' words, each by the log of its rarity."""
    said = []
    for concept in data.concepts:
        texts = [emoji.captions(concept)[k] for k in kinds]
        said.append([data.ids(" " + within_a_sentence(text)) for text in texts])
    having = Counter(token for i in fitted for token in set(chain(*said[i])))
    weight = {token: math.log(len(fitted) / count) + 1e-6 for token, count in having.items()}
    targets = []
    for texts in said:
        ids = list(chain(*texts))
        weights = torch.tensor([weight.get(i, math.log(len(fitted))) for i in ids])
        targets.append(weights @ table[ids] / weights.sum())
    return torch.stack(targets)


def soft_targets(states: Tensor, table: Tensor, background: bool = True) -> Tensor:
    """Return the mean embedding of the words that the LM expects after each text, less what it expects after all."""
    logits = states @ table.T
    chance = logits.softmax(-1)
    if background:
        chance = (chance - chance.mean(0)).clamp_min(0)
        chance = chance / chance.sum(-1, keepdim=True)
    return chance @ table


def fit_rows(targets: Tensor, features: Tensor, fitted: list[int], penalty: float, scale: float) -> Tensor:
    """Return rows (n, styles, d): ridge regression of targets, then as spread as the targets times `scale`."""
    x = features[fitted].flatten(0, 1)
    t = targets[fitted].repeat_interleave(features.shape[1], 0)
    mx, sx, mt = x.mean(0), x.std(0) + 1e-6, t.mean(0)
    xs, td = (x - mx) / sx, t - mt
    gram = xs.T @ xs / len(xs)
    weight = torch.linalg.solve(gram + penalty * torch.eye(len(gram)), xs.T @ td / len(xs))
    found = (features - mx) / sx @ weight
    spread = td.std(0).norm() / (xs @ weight).std(0).norm()
    return mt + scale * spread * found
