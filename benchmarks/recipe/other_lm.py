"""The same closed form, with no setting changed, on two LMs: captions that are names alone, validation concepts."""

import json
from pathlib import Path

import torch
from data import Data
from fitting import Form, Solver, unit
from lm import CACHE
from retrieval import TODAY, moments, report
from transformers import AutoTokenizer

data = Data(AutoTokenizer.from_pretrained(CACHE / "smollm2-135m-instruct"))
train, test, x = torch.tensor(data.split["train"]), torch.tensor(data.split["validation"]), data.features
found = {}
for name in ("smollm2", "gemma3"):
    for place, where in ((-2, "last word"), (-1, "[RET]")):
        states = unit(torch.load(CACHE / f"recipe/{name}-bf16/cap0__looks.pt").float()[:, place])
        solver = Solver(moments([states], x, train))
        for label, form in (("recipe", Form(a=1, b=3)), ("today's form", TODAY)):
            got = report(solver.solve(form), {"captions": [states]}, x, train, test)["captions"]
            found[f"{name}, {where}, {label}"] = got
            print(name, where, label, got, flush=True)
(Path(__file__).parent / "results" / "other_lm.json").write_text(json.dumps(found, indent=1) + "\n")
