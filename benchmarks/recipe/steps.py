"""What steps of AdamW do to a closed form: on kept states, so that nothing but the two linear layers moves.

python steps.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from data import Data
from fitting import Form, Moments, Solver, ranks, recall, unit
from lm import CACHE
from torch.nn import functional as F
from transformers import AutoTokenizer

STATES = CACHE / "recipe" / "smollm2-bf16"


def main() -> None:
    data = Data(AutoTokenizer.from_pretrained(CACHE / "smollm2-135m-instruct"))
    train, held = torch.tensor(data.split["train"]), torch.tensor(data.split["validation"])
    texts = [unit(torch.load(STATES / f"cap{k}__looks.pt").float()[:, -2]) for k in (0, 1)]
    if "plain" in sys.argv:
        # Read at [RET] right behind the text, captions that are names and requests, as the demo does today.
        texts = [unit(torch.load(STATES / f"{f}__none.pt").float()[:, -1]) for f in ("cap0", "fita")]
    x = data.features
    x = (x - x[train].mean((0, 1))) / (x[train].std((0, 1)) + 1e-6)
    moments = sum(
        (Moments.of(t[train], x[train, s]) for t in texts for s in (0, 1)), start=Moments.of(texts[0][:0], x[:0, 0])
    )
    solver = Solver(moments)
    starts = {
        "reduced-rank ridge (today)": solver.solve(Form(p=0, a=0, b=1, alpha=0, beta=1)),
        "partly whitened (new)": solver.solve(Form(p=0.5, a=1, b=3)),
    }
    if "random" in sys.argv:
        # Where the demo starts today: rows with a request skip the closed form.
        torch.manual_seed(0)
        layers = torch.nn.Linear(576, 256), torch.nn.Linear(1280, 256)
        maps = starts["partly whitened (new)"]
        maps.text, maps.image = (layer.weight.detach() for layer in layers)
        maps.text_mean, maps.image_mean = torch.zeros(576), torch.zeros(1280)
        starts = {"random layers": maps}
    results = []
    for name, maps in starts.items():
        for rate in (1e-3,) if len(sys.argv) > 1 else (1e-3, 1e-4, 1e-5):
            for decay in ("none",) if len(sys.argv) > 1 else ("none", "towards the start"):
                if decay != "none" and rate != 1e-3:
                    continue
                results += run(name, maps, rate, decay, texts, x, train, held)
    out = Path(__file__).parent / "results" / ("_".join(["steps", *sys.argv[1:]]) + ".json")
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")


def run(name, maps, rate, decay, texts, x, train, held):
    torch.manual_seed(0)
    text, image = torch.nn.Linear(576, 256), torch.nn.Linear(1280, 256)
    with torch.no_grad():
        # Outputs of unit length are what is compared, so only the scale of a map against the step is free.
        text.weight.copy_(maps.text)
        text.bias.copy_(-maps.text @ maps.text_mean)
        image.weight.copy_(maps.image)
        image.bias.copy_(-maps.image @ maps.image_mean)
    start = [p.detach().clone() for m in (text, image) for p in m.parameters()]
    scale = torch.nn.Parameter(torch.tensor(1 / 0.07).log())
    weights = [*text.parameters(), *image.parameters()]
    optimizer = torch.optim.AdamW([*weights, scale], lr=rate, betas=(0.9, 0.95), weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=101, pct_start=0.05)
    found = []
    for step in range(101):
        if step in (0, 1, 5, 20, 100):
            found.append(measure(name, rate, decay, step, text, image, start, texts, x, train, held))
            print(found[-1], flush=True)
        chosen = train[torch.randint(len(train), (128,))]
        kind, style = torch.randint(2, (2, 128))
        t = F.normalize(text(torch.stack(texts)[kind, chosen]), dim=-1)
        v = F.normalize(image(x[chosen, style]), dim=-1)
        logits = scale.exp() * t @ v.T
        same = (chosen[:, None] == chosen) & ~torch.eye(128, dtype=torch.bool)
        logits = logits.masked_fill(same, -1e4)
        loss = (F.cross_entropy(logits, torch.arange(128)) + F.cross_entropy(logits.T, torch.arange(128))) / 2
        if decay != "none":
            loss = loss + sum((p - s).square().sum() / s.square().sum() for p, s in zip(weights, start, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return found


@torch.no_grad()
def measure(name, rate, decay, step, text, image, start, texts, x, train, held):
    def scores(places):
        v = [F.normalize(image(x[places, s]), dim=-1) for s in (0, 1)]
        return [F.normalize(text(t[places]), dim=-1) @ one.T for t in texts for one in v]

    now = [p for m in (text, image) for p in m.parameters()]
    moved = [float((p - s).norm() / s.norm()) for p, s in zip(now, start, strict=True)]
    return {
        "start": name,
        "rate": rate,
        "decay": decay,
        "step": step,
        "seen": recall(torch.cat([ranks(s) for s in scores(train[:150])])),
        "unseen": recall(torch.cat([ranks(s) for s in scores(held)])),
        "moved_text_image": [round(moved[0], 3), round(moved[2], 3)],
        "rms_text_image": [round(float(start[i].square().mean().sqrt()), 5) for i in (0, 2)],
    }


if __name__ == "__main__":
    main()
