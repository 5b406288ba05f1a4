"""Fit from a stream: second moments per fold and a small sample of held-out pairs; memory does not grow with pairs.

    python streaming.py 100000

Checks the maps against those from all rows at once, then measures memory and time over so many random pairs. Penalties
are chosen on a sample of each fold's pairs (at most `SAMPLE` groups, those of the smallest hashes, so the sample does
not depend on the order), under maps from the other folds' moments: total less own.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import resource
import sys
import time
from collections.abc import Hashable, Iterable
from pathlib import Path

import torch
from fitting import Form, Maps, Moments, Solver, ranks, recall
from torch import Tensor

FOLDS, SAMPLE, CHUNK = 5, 256, 1024
GRID = tuple(Form(p=0.5, a=a, b=b) for a in (0.3, 1.0, 3.0) for b in (1.0, 3.0, 10.0))


def stable(group: Hashable) -> int:
    return int.from_bytes(hashlib.sha256(repr(group).encode()).digest()[:8], "big")


class Stream:
    """Takes pairs a chunk at a time.

    Moments are taken about a fixed point, the first chunk's mean, so that nothing cancels; they are exact sums all the
    same. A fold is chosen by the group's hash, so a group is in one fold however often and whenever it comes.
    """

    def __init__(self) -> None:
        self.folds: list[Moments | None] = [None] * FOLDS
        self.about: tuple[Tensor, Tensor] | None = None
        self.samples: list[list] = [[] for _ in range(FOLDS)]
        self.held: list[dict] = [{} for _ in range(FOLDS)]

    def add(self, texts: Tensor, images: Tensor, groups: Iterable[Hashable]) -> None:
        hashes = [stable(group) for group in groups]
        if self.about is None:
            self.about = texts.double().mean(0), images.double().mean(0)
        t, x = texts.double() - self.about[0], images.double() - self.about[1]
        fold = torch.tensor([h % FOLDS for h in hashes])
        for n in fold.unique().tolist():
            own = (fold == n).nonzero()[:, 0]
            if self.folds[n] is None:
                self.folds[n] = Moments.of(t[own], x[own])
            else:
                self.folds[n].take(t[own], x[own])
            for i in own.tolist():
                self._sample(n, hashes[i] // FOLDS, texts[i], images[i])

    def _sample(self, n: int, key: int, text: Tensor, image: Tensor) -> None:
        heap, held = self.samples[n], self.held[n]
        if key in held:
            return
        if len(heap) < SAMPLE:
            heapq.heappush(heap, -key)
        elif -key > heap[0]:
            del held[-heapq.heappushpop(heap, -key)]
        else:
            return
        held[key] = (text.clone(), image.clone())

    def maps(self, moments: Moments, forms: Iterable[Form]) -> list[Maps]:
        solver = Solver(moments)
        found = [solver.solve(form) for form in forms]
        for one in found:
            one.text_mean = one.text_mean + self.about[0].float()
            one.image_mean = one.image_mean + self.about[1].float()
        return found

    def fit(self, forms: tuple[Form, ...] = GRID, tried: int = FOLDS) -> tuple[Maps, Form, list[float]]:
        """Return the maps of the form that finds most at 1, 5 and 10, both ways, in the sampled held-out pairs."""
        present = [m for m in self.folds if m is not None]
        total = sum(present[1:], start=present[0])
        scores = torch.zeros(len(forms))
        for n in range(min(tried, FOLDS)):
            if self.folds[n] is None or len(self.held[n]) < 10:
                continue
            t, x = (torch.stack(column) for column in zip(*self.held[n].values(), strict=True))
            for i, one in enumerate(self.maps(total - self.folds[n], forms)):
                s = one.texts(t) @ one.images(x).T
                scores[i] += sum(recall(ranks(s))) + sum(recall(ranks(s.T)))
        best = forms[int(scores.argmax())]
        return self.maps(total, (best,))[0], best, scores.tolist()


def check() -> dict:
    """Compare chunks of 37 rows with all rows at once, in double precision, up to the sign of each direction."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(900, 40, generator=generator)
    t = hidden @ torch.randn(40, 96, generator=generator) + torch.randn(900, 96, generator=generator) + 5
    x = hidden @ torch.randn(40, 160, generator=generator) + torch.randn(900, 160, generator=generator) - 3
    stream = Stream()
    for i in range(0, 900, 37):
        stream.add(t[i : i + 37], x[i : i + 37], [f"g{n // 2}" for n in range(i, min(i + 37, 900))])
    form = Form(p=0.5, a=1, b=3, q=32)
    present = [m for m in stream.folds if m is not None]
    streamed = stream.maps(sum(present[1:], start=present[0]), (form,))[0]
    # Directly: standardise rows, whiten by the rows' own SVDs, one SVD more.
    td, xd = t.double(), x.double()
    ts, xs = td.std(0, correction=0), xd.std(0, correction=0)
    a, b = (td - td.mean(0)) / ts, (xd - xd.mean(0)) / xs
    ua, sa, va = torch.linalg.svd(a / 30, full_matrices=False)
    ub, sb, vb = torch.linalg.svd(b / 30, full_matrices=False)
    wa = va.T @ torch.diag((sa**2 + form.a * (sa**2).mean()) ** -0.5) @ va
    wb = vb.T @ torch.diag((sb**2 + form.b * (sb**2).mean()) ** -0.5) @ vb
    u, s, v = torch.linalg.svd(wa @ (a.T @ b / 900) @ wb)
    root = s[:32].sqrt()
    direct_t = torch.nn.functional.normalize(a @ wa @ u[:, :32] * root, dim=-1)
    direct_x = torch.nn.functional.normalize(b @ wb @ v[:32].T * root, dim=-1)
    wanted = direct_t @ direct_x.T
    found = (streamed.texts(t) @ streamed.images(x).T).double()
    return {"largest_difference_of_cosines": float((wanted - found).abs().max())}


def measure(pairs: int, d: int = 576, f: int = 1280) -> dict:
    generator = torch.Generator().manual_seed(0)
    mix_t, mix_x = torch.randn(64, d, generator=generator), torch.randn(64, f, generator=generator)
    stream = Stream()
    seconds, peaks = 0.0, []
    for start in range(0, pairs, CHUNK):
        count = min(CHUNK, pairs - start)
        hidden = torch.randn(count, 64, generator=generator)
        t = hidden @ mix_t + 8 * torch.randn(count, d, generator=generator)
        x = hidden @ mix_x + 8 * torch.randn(count, f, generator=generator)
        clock = time.process_time()
        stream.add(t, x, range(start, start + count))
        seconds += time.process_time() - clock
        if start // CHUNK in (1, pairs // CHUNK // 2, pairs // CHUNK - 1):
            peaks.append(round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
    clock = time.process_time()
    _, best, scores = stream.fit()
    solve = time.process_time() - clock
    kept = sum(sum(v.numel() * 8 for v in vars(m).values() if isinstance(v, Tensor)) for m in stream.folds)
    return {
        "pairs": pairs,
        "cpu_seconds_adding": round(seconds, 1),
        "cpu_seconds_solving": round(solve, 1),
        "peak_mb_after_2_chunks_half_all": peaks,
        "moments_mb": round(kept / 2**20, 1),
        "chosen": [best.a, best.b],
        "multiply_adds_per_pair": f * f + d * d + f * d,
    }


if __name__ == "__main__":
    result = {"check": check(), "measured": measure(int(sys.argv[1]))}
    print(json.dumps(result))
    (Path(__file__).parent / "results").mkdir(exist_ok=True)
    (Path(__file__).parent / "results" / "streaming.json").write_text(json.dumps(result, indent=1) + "\n")
