"""Image rows that leave the LM in the states that their captions' words leave it in, at several depths."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from image_tokens import Captioner
from torch import Tensor
from transformers.cache_utils import DynamicCache

from visual_ground.demo import emoji
from visual_ground.training.initialization.idf import idf_weights as telling
from visual_ground.training.initialization.idf import without_sentence_marks as within_a_sentence


def mean_square(error: Tensor) -> Tensor:
    """Return the mean square of all errors."""
    return error.square().mean()


class _Reached(Exception):
    pass


class Imitation:
    """Gives states at chosen layers (1 is the first layer's output), stopping behind the deepest.

    Args:
        lm: the LM.
        captioner: whose prompt is meant.
        depths: numbers of layers.
    """

    def __init__(self, lm: Any, captioner: Captioner, depths: tuple[int, ...]) -> None:
        self.lm, self.captioner, self.depths = lm, captioner, depths
        self.core = lm.get_decoder()
        self.base = DynamicCache()
        with torch.no_grad():
            self.core(inputs_embeds=captioner.table(captioner.before), cache=self.base, use_cache=True)

    def states(self, rows: Tensor) -> list[Tensor]:
        """Return per depth the states (b, s, h) of rows (b, s, d) after the prompt's beginning."""
        found: dict[int, Tensor] = {}

        def note(depth: int):
            def hook(module: Any, args: Any, output: Any) -> None:
                found[depth] = output[0] if isinstance(output, tuple) else output
                if depth == max(self.depths):
                    raise _Reached

            return hook

        cache = DynamicCache()
        for n, layer in enumerate(self.base.layers):
            shape = (len(rows), -1, -1, -1)
            cache.update(layer.keys.expand(shape), layer.values.expand(shape), n)
        handles = [self.core.layers[d - 1].register_forward_hook(note(d)) for d in self.depths]
        try:
            self.core(inputs_embeds=rows.to(self.captioner.table.weight.dtype), cache=cache, use_cache=True)
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return [found[d].float() for d in self.depths]

    @torch.no_grad()
    def told(self, numbers: list[int], kinds: tuple[int, ...] = (0, 1), colon: bool = False) -> list[Tensor]:
        """Return per depth each concept's mean state (n, h) at its captions' words, rare words more.

        With `colon`, the state at what stands after the image follows as a second one: (n, 2, h).
        """
        data = self.captioner.data
        said = {
            i: [tuple(data.ids(" " + within_a_sentence(emoji.captions(data.concepts[i])[k]))) for k in kinds]
            for i in numbers
        }
        weight = telling(said)
        texts = sorted(set(chain(*said.values())), key=len)
        after = tuple(self.captioner.after[0].tolist()) if colon else ()
        place, sums, ends = {}, [[] for _ in self.depths], [[] for _ in self.depths]
        by_length: dict[int, list] = {}
        for text in texts:
            by_length.setdefault(len(text), []).append(text)
        for length, own in by_length.items():
            for start in range(0, len(own), 64):
                some = own[start : start + 64]
                ids = torch.tensor([[*text, *after] for text in some])
                share = torch.tensor([[weight[t] for t in text] for text in some])
                for n, state in enumerate(self.states(self.captioner.table(ids))):
                    sums[n].append(torch.einsum("bsd,bs->bd", state[:, :length], share))
                    ends[n].append(state[:, -1])
                for text in some:
                    place[text] = len(place)
        results = []
        for one, end in zip(sums, ends, strict=True):
            one, end, means = torch.cat(one), torch.cat(end), []
            for i in numbers:
                own = [place[text] for text in said[i]]
                mean = one[own].sum(0) / sum(sum(weight[t] for t in text) for text in said[i])
                means.append(torch.stack([mean, end[own].mean(0)]) if colon else mean)
            results.append(torch.stack(means))
        return results

    def fit(
        self,
        z: Tensor,
        start: tuple[Tensor, Tensor],
        wanted: list[Tensor],
        mean: Tensor,
        std: Tensor,
        copies: int = 1,
        steps: int = 100,
        batch: int = 64,
        step: float = 0.2,
        seed: int = 0,
        measure: Callable[[Tensor], Tensor] = mean_square,
    ) -> tuple[Tensor, Tensor]:
        """Return weight (k d, q) and bias of rows `mean + std * (W z + b)`; z (n, styles, q), wanted per depth."""
        weight, bias = (one.clone().requires_grad_() for one in start)
        rate = step / z.shape[-1]
        groups = [{"params": [weight], "lr": rate}, {"params": [bias], "lr": rate * z.shape[-1] / 10}]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        spreads = [w.std(0, correction=0) + 1e-6 for w in wanted]
        draw = torch.Generator().manual_seed(seed)
        after = self.captioner.table(self.captioner.after).detach()
        for n in range(steps):
            chosen = torch.randint(len(z), (batch,), generator=draw)
            style = torch.randint(z.shape[1], (batch,), generator=draw)
            rows = mean + std * (z[chosen, style] @ weight.T + bias).view(batch, copies, -1)
            loss = 0.0
            colon = wanted[0].dim() == 3
            read = torch.cat([rows, after.float().expand(batch, -1, -1)], 1) if colon else rows
            for state, aim, spread in zip(self.states(read), wanted, spreads, strict=True):
                own = torch.stack([state[:, copies - 1], state[:, -1]], 1) if colon else state[:, -1]
                loss = loss + measure((own - aim[chosen]) / spread) / len(wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if n % 20 == 0 or n == steps - 1:
                print("  step", n, round(float(loss), 4), flush=True)
        return weight.detach(), bias.detach()
