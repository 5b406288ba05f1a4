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
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from adapters import load_adapter
from data import families
from orders import ORDERS, Layer, Study
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from visual_ground.demo import emoji
from visual_ground.demo.pairs import Pairs
from visual_ground.fitting.autocast import autocast_lm
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
        pairs: the demo's concepts.
    """

    def __init__(self, study: Study, pairs: Pairs) -> None:
        self.study, self.pairs, self.numbers = study, pairs, pairs.numbers("train")
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
            for style in self.pairs.features[i]:
                for caption in emoji.captions(self.pairs.concepts[i])[:2]:
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
        width, lead = max(map(len, captions)), len(self.after) + 1
        first = frozen_lm.vocabulary.first_image_id
        rows = [[first + i * m + j, *self.after, *ids, *[0] * (width - len(ids))]
                for i, ids in enumerate(captions) for j in range(m)]  # fmt: skip
        ids = torch.tensor(rows)
        read = torch.arange(n * m)[:, None] * ids.shape[1] + torch.arange(lead - 1, lead + width - 1)
        cache = fixed_cache(expanded(self.keys_values, n * m))
        mask = torch.ones(n * m, ids.shape[1] + self.keys_values[0][0].shape[2], dtype=torch.long)
        options = {"cache": cache, "use_cache": True}
        logits = frozen_lm.read(ids, mask, read.flatten(), tokens.repeat(n, 1), **options).logits.float()
        said = ids[:, lead:]
        found = (logits.gather(-1, said.flatten()[:, None])[:, 0] - logits.logsumexp(-1)).view(n, m, width)
        kept = torch.tensor([[1.0] * len(own) + [0.0] * (width - len(own)) for own in captions])
        return (found * kept[:, None]).sum(-1)


def main() -> None:
    """Fit, learn, measure, write."""
    model, pairs = load_adapter(sys.argv[1])
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else STEPS
    model.adapter.train()
    for parameter in model.adapter.parameters():
        parameter.requires_grad_(True)
    with tempfile.TemporaryDirectory() as folder:
        study = Study(model, pairs, Path(folder))
    tokens, teller, adapter = Tokens(study, pairs), Teller(model), model.adapter
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
