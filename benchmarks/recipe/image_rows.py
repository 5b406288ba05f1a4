"""Image rows fitted to words in closed form over the retrieval space's image side, then by imitation; measured.

    python image_rows.py validation closed im8 im8-15-22 im8-15-22-colon
    python image_rows.py test im8x1.4        (once, after choosing)

A name is "closed" or "im" with depths; "x1.4" puts rows 1.4 times as far from their mean.

Needs `compute.py smollm2 bf16 cap0,cap1,fita looks` first. Pair accuracy as `evaluation.caption_pair_accuracy` has it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from data import Data
from fitting import Form, Solver, unit
from image_tokens import Captioner, names_said, pair_accuracy, word_targets
from imitation import Imitation
from lm import CACHE, load
from retrieval import moments


def main() -> None:
    split, *which = sys.argv[1:]
    lm, tokenizer = load("smollm2")
    table = lm.get_input_embeddings().weight.detach().clone().float()
    lm, data = lm.to(torch.bfloat16), Data(tokenizer)
    captioner = Captioner(lm, tokenizer, data)
    train, test, x = data.split["train"], data.split[split], data.features
    places = torch.tensor(train)
    texts = [
        unit(torch.load(CACHE / f"recipe/smollm2-bf16/{f}__looks.pt").float()[:, -2]) for f in ("cap0", "cap1", "fita")
    ]
    # The image side of the shared space, weighted by S (beta = 1): what images do not tell about texts is shrunk away.
    maps = Solver(moments(texts, x, places)).solve(Form(a=1, b=3, beta=1))
    z = (x - maps.image_mean) @ maps.image.T
    z = z / z[places].square().mean().sqrt()
    mean, std = table.mean(0), table.std(0)
    words = word_targets(data, table, train)

    def closed(penalty: float = 10.0, scale: float = 1.0):
        own = z[places].flatten(0, 1)
        aims = ((words - mean) / std)[places].repeat_interleave(z.shape[1], 0)
        middle, centre = aims.mean(0), own.mean(0)
        own = own - centre
        gram = own.T @ own / len(own)
        eye = torch.eye(len(gram)) * gram.diagonal().mean() * penalty
        weight = torch.linalg.solve(gram + eye, own.T @ (aims - middle) / len(own)).T
        weight = weight * scale * aims.std(0).norm() / (own @ weight.T).std(0).norm()
        return weight, middle - weight @ centre

    results = {}

    def measure(name: str, fitted, seconds: float) -> None:
        weight, bias = fitted
        rows = mean + std * (z @ weight.T + bias)[:, :, None]
        middle = rows[places].mean((0, 1))
        rows = middle + float(name.partition("x")[2] or 1) * (rows - middle)
        # One caption and one picture of each concept, kinds and styles by turns, as the demo has them.
        own = torch.stack([rows[i, n // 2 % 2] for n, i in enumerate(test)])
        captions = [data.captions(n % 2)[i] for n, i in enumerate(test)]
        seen = train[:: len(train) // 60][:60]
        said = captioner.captions(own[:60])
        seen_said = captioner.captions(torch.stack([rows[i, 0] for i in seen]))
        results[name] = {
            "pair_accuracy_unseen": pair_accuracy(captioner, own, captions, 4),
            "name_or_keyword_said_unseen": names_said([data.concepts[i] for i in test[:60]], said),
            "name_or_keyword_said_seen": names_said([data.concepts[i] for i in seen], seen_said),
            "cpu_seconds_fit": round(seconds, 1),
        }
        print(name, results[name], flush=True)

    for name in which:
        start, way = time.process_time(), name.partition("x")[0]
        if way == "closed":
            measure(name, closed(), time.process_time() - start)
            continue
        colon = way.endswith("-colon")
        kept = CACHE / f"recipe/{way.removesuffix('-colon')}{colon}.pt"
        if not kept.exists():
            imitation = Imitation(lm, captioner, tuple(int(d) for d in way[2:].removesuffix("-colon").split("-")))
            torch.save(imitation.fit(z[places], closed(), imitation.told(train, colon=colon), mean, std), kept)
        measure(name, torch.load(kept), time.process_time() - start)
    out = Path(__file__).parent / "results" / f"image_rows_{split}.json"
    known = json.loads(out.read_text()) if out.exists() else {}
    out.write_text(json.dumps({**known, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
