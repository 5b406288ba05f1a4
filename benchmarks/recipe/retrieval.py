"""The retrieval part of the recipe, from kept states: fitted to captions and requests together, measured.

python retrieval.py smollm2 validation
python retrieval.py smollm2 test         (once, after choosing)
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from compute import kept
from data import Data
from fitting import Form, Moments, Solver, folds, ranks, recall, unit
from lm import CACHE, FOLDERS
from torch import Tensor
from transformers import AutoTokenizer

GRID = tuple(Form(a=a, b=b) for a in (0.3, 1.0, 3.0) for b in (1.0, 3.0, 10.0))
TODAY = Form(p=0, a=0, b=1.0, alpha=0, beta=1)


def moments(texts: list[Tensor], x: Tensor, places: Tensor) -> Moments:
    return sum(
        (Moments.of(t[places], x[places, s]) for t in texts for s in range(x.shape[1])),
        start=Moments.of(texts[0][:0], x[:0, 0]),
    )


def choose(texts: list[Tensor], x: Tensor, places: Tensor, seed: int, forms: tuple[Form, ...]) -> tuple[Form, list]:
    """Choose a form by the recalls of held-out groups (each group a concept), both ways, all kinds of texts."""
    parts = folds(list(range(len(places))), 5, seed)
    each = [moments(texts, x, places[parts == n]) for n in range(5)]
    total = sum(each[1:], start=each[0])
    scores = torch.zeros(len(forms))
    for n in range(5):
        solver, held = Solver(total - each[n]), places[parts == n]
        for i, form in enumerate(forms):
            maps = solver.solve(form)
            for t in texts:
                vectors = maps.texts(t[held])
                for s in range(x.shape[1]):
                    cosines = vectors @ maps.images(x[held, s]).T
                    scores[i] += sum(recall(ranks(cosines))) + sum(recall(ranks(cosines.T)))
    scores /= 5 * len(texts) * x.shape[1] * 6
    return forms[int(scores.argmax())], [round(s, 2) for s in scores.tolist()]


def report(maps, held_out: dict[str, Tensor], x: Tensor, train: Tensor, test: Tensor) -> dict:
    """Return recalls: unseen both ways, of seen ones among 150, and among all pictures of both."""
    images = [maps.images(x[:, s]) for s in range(x.shape[1])]
    everything, some = torch.cat([train, test]), train[:150]
    result = {}
    for name, texts in held_out.items():
        vectors = [maps.texts(t) for t in texts]
        way = lambda of, among: recall(torch.cat([ranks(v[of] @ i[among].T) for v in vectors for i in images]))  # noqa: E731
        result[name] = {
            "unseen_text_to_image": way(test, test),
            "unseen_image_to_text": recall(torch.cat([ranks(i[test] @ v[test].T) for v in vectors for i in images])),
            "seen_text_to_image_of_150": way(some, some),
            "seen_text_to_image_of_all": way(train, everything),
            "all": len(everything),
        }
    return result


def main() -> None:
    name, split = sys.argv[1:3]
    prompts = sys.argv[3].split(",") if len(sys.argv) > 3 else ["looks"]
    grid = GRID if "--choose" in sys.argv else (Form(a=1.0, b=3.0),)
    data = Data(AutoTokenizer.from_pretrained(CACHE / FOLDERS[name]))
    store, _ = kept(name, "bf16", loaded=False)
    train, test, x = torch.tensor(data.split["train"]), torch.tensor(data.split[split]), data.features
    new = "choosea" if split == "validation" else "reporta"
    found: dict = {}
    for prompt in prompts:
        for place, where in ((-2, "last word"), (-1, "[RET]"))[: 2 if split == "validation" else 1]:

            def states(family: str) -> Tensor | None:
                path = store.folder / f"{family}__{prompt}.pt"
                return unit(torch.load(path).float()[:, place]) if path.exists() else None

            caps = [states("cap0"), states("cap1")]
            caps = [c for c in caps if c is not None]
            asked = [a for a in (states("fita"), states("fitb")) if a is not None]
            for seed in range(3):
                start = time.process_time()
                requests = asked[seed % len(asked)]
                if seed == 2 and len(asked) == 2:
                    half = torch.rand(len(x), 1, generator=torch.Generator().manual_seed(2)) < 0.5
                    requests = torch.where(half, asked[0], asked[1])
                texts = [*caps, requests]
                form, scores = choose(texts, x, train, seed, grid) if len(grid) > 1 else (grid[0], None)
                chosen = time.process_time() - start
                solver = Solver(moments(texts, x, train))
                tests = {"captions": caps, "requests": [requests]}
                if states(new) is not None:
                    tests["requests in other words"] = [states(new)]
                answered = states("ansv" if split == "validation" else "anst")
                if answered is not None:
                    tests["answers to requests in other words"] = [answered]
                for label, one in (("recipe", form), ("today's form", TODAY)):
                    got = report(solver.solve(one), tests, x, train, test)
                    found[f"{prompt}, {where}, seed {seed}, {label}"] = {
                        "a": one.a,
                        "b": one.b,
                        "held_out": scores if label == "recipe" else None,
                        **got,
                    }
                    print(prompt, where, seed, label, one.a, one.b, f"{chosen:.1f} cpu s", flush=True)
                    for key, value in got.items():
                        print("   ", key, value)
    out = Path(__file__).parent / "results" / f"retrieval_{name}_{split}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
