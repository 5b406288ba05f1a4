"""Whether image tokens tell more caption pairs if a map behind them learns from pictures that they were not fitted to.

    RECIPE_CACHE=demo/cache python other_folds.py ADAPTER [STEPS]

Image tokens of four folds of families are fitted without each fold, by imitation as `fit` does, and give the tokens of
the fold's pictures: as far off as those of unseen things. A map (d, d) behind all tokens, at first the identity, then
learns to tell each of 16 captions' own picture from the 15 others, and is put behind the image tokens that were fitted
to all; captioning steps follow, in three orders. Measures caption pairs on validation, as orders.py does. Writes
results/other_folds.json.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from data import families
from orders import ORDERS, Layer, Study
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from visual_ground.demo import emoji
from visual_ground.fitting.autocast import autocast_lm
from visual_ground.lm.reading import log_likelihoods
from visual_ground.training.initialization.data_dependent import start_image_tokens
from visual_ground.training.speedups.kv_cache import SharedPrefixCache, expanded, fixed_cache

FOLDS, STEPS, BATCH, EVERY = 4, 40, 16, 20
RATE, BIAS_RATE = 1e-4, 0.02
# How much the likelihood of the right picture's caption counts beside telling it from the others.
LIKELIHOOD = 0.2


class Tokens:
    """Image tokens of the training pictures, each by what was fitted without its fold.

    Args:
        study: fits and measures.
    """

    def __init__(self, study: Study) -> None:
        self.study, pairs = study, study.pairs
        self.numbers = pairs.numbers("train")
        of = families(SimpleNamespace(concepts=pairs.concepts))
        known = sorted({of[i] for i in self.numbers})
        random.Random(0).shuffle(known)
        fold = {family: n % FOLDS for n, family in enumerate(known)}
        folds = torch.tensor([fold[of[i]] for i in self.numbers])
        shown = pairs.features[self.numbers]
        self.standardised = torch.zeros(*shown.shape[:2], study.parameters[1].numel())
        for n in range(FOLDS):
            self._fit([i for i, own in zip(self.numbers, folds.tolist(), strict=True) if own != n])
            with torch.no_grad():
                adapter = study.model.adapter
                self.standardised[folds == n] = adapter.image_projection(adapter.standardize(shown[folds == n]))
        self._fit(self.numbers)
        self.layer = study.layer()

    def _fit(self, numbers: list[int]) -> None:
        examples, features = [], []
        for i in numbers:
            for style in self.study.pairs.features[i]:
                for caption in emoji.captions(self.study.pairs.concepts[i])[:2]:
                    examples.append({"caption": caption, "group": i})
                    features.append(style)
        with autocast_lm(self.study.model.lm, self.study.dtype):
            start_image_tokens(self.study.model, examples, torch.stack(features))


class Teller:
    """The log-likelihoods of captions after image tokens, with gradients.

    Args:
        model: the grounded model.
    """

    def __init__(self, model: Any) -> None:
        prefix = model.processor.caption_prefix(image=True)
        place = next(i for i, token in enumerate(prefix) if token < 0)
        self.model, self.after = model, list(prefix[place + 1 :])
        self.keys_values = SharedPrefixCache(model).get(tuple(prefix[:place]))

    def scores(self, tokens: Tensor, captions: list[tuple[int, ...]]) -> Tensor:
        """Return log p (n, m) of n captions, each after each of m image tokens (m, d)."""
        frozen_lm, (n, m) = self.model.frozen_lm, (len(captions), len(tokens))
        rows = [(*self.after, *caption) for caption in captions for _ in range(m)]
        width, pad_id = 1 + max(map(len, rows)), self.model.processor.pad_token_id
        own = frozen_lm.vocabulary.first_image_id + torch.arange(n * m)
        rest = torch.tensor([[*row, *[pad_id] * (width - 1 - len(row))] for row in rows])
        ids, lengths = torch.cat([own[:, None], rest], 1), [len(row) - len(self.after) for row in rows]
        scored = [i * width + j for i, row in enumerate(rows) for j in range(1 + len(self.after), 1 + len(row))]
        read, options = torch.tensor(scored), {"cache": fixed_cache(expanded(self.keys_values, n * m))}
        mask = torch.ones(n * m, width + self.keys_values[0][0].shape[2], dtype=torch.long)
        logits = frozen_lm.read(ids, mask, read - 1, tokens.repeat(n, 1), use_cache=True, **options).logits
        return log_likelihoods(logits, ids.flatten()[read], lengths).view(n, m)


def main() -> None:
    """Fit, learn, measure, write."""
    study, steps = Study(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else STEPS
    model, pairs = study.model, study.pairs
    tokens, teller, adapter = Tokens(study), Teller(model), model.adapter
    found: dict[str, Any] = {"imitation": study.told(tokens.layer)}
    print(found, flush=True)
    captions = [[tuple(model.processor.encode_caption(text)) for text in emoji.captions(pairs.concepts[i])[:2]]
                for i in tokens.numbers]  # fmt: skip
    width = tokens.standardised.shape[-1]
    change, shift = torch.zeros(width, width, requires_grad=True), torch.zeros(width, requires_grad=True)
    groups = [{"params": [change], "lr": RATE}, {"params": [shift], "lr": BIAS_RATE}]
    optimizer, draw = torch.optim.Adam(groups, betas=(0.9, 0.95)), torch.Generator().manual_seed(0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, steps + 1):
        chosen = torch.randperm(len(captions), generator=draw)[:BATCH]
        style, kind = torch.randint(2, (2, BATCH), generator=draw)
        own = tokens.standardised[chosen, style]
        own = adapter.embedding_mean + adapter.embedding_std * (own + own @ change.T + shift)
        said = [captions[i][k] for i, k in zip(chosen.tolist(), kind.tolist(), strict=True)]
        with autocast_lm(model.lm, study.dtype), sdpa_kernel(SDPBackend.MATH):
            scores = teller.scores(own, said)
        likelihood = scores.diagonal().sum() / sum(map(len, said))
        optimizer.zero_grad()
        (F.cross_entropy(scores, torch.arange(BATCH)) - LIKELIHOOD * likelihood).backward()
        optimizer.step()
        schedule.step()
        if step % EVERY == 0:
            found[f"{step} steps"] = study.told(behind(tokens.layer, change.detach(), shift.detach()))
            print(found, flush=True)
    layer = behind(tokens.layer, change.detach(), shift.detach())
    found["and captioning steps"] = [study.told(study.caption(layer, order)) for order in ORDERS]
    print(found, flush=True)
    out = Path(__file__).parent / "results" / "other_folds.json"
    known = json.loads(out.read_text()) if out.exists() else {}
    out.write_text(json.dumps({**known, f"a run of {steps}": found}, indent=1) + "\n")


def behind(layer: Layer, change: Tensor, shift: Tensor) -> Layer:
    """Return the layer with the map behind it."""
    weight, bias = layer
    return [weight + change @ weight, bias + change @ bias + shift]


if __name__ == "__main__":
    main()
