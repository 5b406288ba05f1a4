"""Retrieval prompts compared: fitted to names of four fifths of the families, found among the rest and validation."""

import json
from pathlib import Path

import torch
from data import Data, families
from fitting import Form, Solver, folds, ranks, recall, unit
from lm import CACHE
from prompts import PROMPTS
from retrieval import moments
from transformers import AutoTokenizer

data = Data(AutoTokenizer.from_pretrained(CACHE / "smollm2-135m-instruct"))
train, x = torch.tensor(data.split["train"]), data.features
number = families(data)
held = folds([number[i] for i in train.tolist()], 5, 0) == 0
fitted, tested = train[~held], torch.cat([train[held], torch.tensor(data.split["validation"])])
forms = {"today's form, b = 3": Form(p=0, a=0, b=3, alpha=0, beta=1), "recipe": Form(a=1, b=3)}
found, eigen = {}, None
for prompt, words in PROMPTS.items():
    for place, where in ((-2, "last word"), (-1, "[RET]")):
        path = CACHE / f"recipe/smollm2-bf16/cap0__{prompt}.pt"
        if not path.exists():
            continue
        states = unit(torch.load(path).float()[:, place])
        solver = Solver(moments([states], x, fitted))
        for label, form in forms.items():
            maps = solver.solve(form)
            images, texts, some = [maps.images(x[:, s]) for s in (0, 1)], maps.texts(states), fitted[:150]
            found[f"{words!r}, {where}, {label}"] = {
                "unseen_text_to_image": recall(torch.cat([ranks(texts[tested] @ i[tested].T) for i in images])),
                "unseen_image_to_text": recall(torch.cat([ranks(i[tested] @ texts[tested].T) for i in images])),
                "seen": recall(torch.cat([ranks(texts[some] @ i[some].T) for i in images])),
            }
    out = Path(__file__).parent / "results" / "prompts_smollm2.json"
    out.write_text(json.dumps(found, indent=1) + "\n")
