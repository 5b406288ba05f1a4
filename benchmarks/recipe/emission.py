"""When to say `[RET]`: its output row fitted convexly to the frozen LM's own answers; its input row compared.

python emission.py smollm2
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from data import CHOOSING, FITTED, REPORTED, Data
from dialogues import NO_PICTURE_CHOOSING, NO_PICTURE_FITTED, NO_PICTURE_MORE, NO_PICTURE_REPORTED, sentence_end
from lm import CACHE, load
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from visual_ground.demo.emoji import stable_number

LENGTH, ROWS = 24, 32


@torch.no_grad()
def answer(lm, tokenizer, prompts, length=LENGTH):
    """Answer greedily; return per prompt its answer's ids and what the head read, log Z and the largest logit."""
    core, head, stop = lm.model, lm.lm_head, tokenizer.convert_tokens_to_ids("<|im_end|>")
    kept = []
    for start in range(0, len(prompts), ROWS):
        some = prompts[start : start + ROWS]
        longest = max(map(len, some))
        ids = torch.tensor([[stop] * (longest - len(p)) + list(p) for p in some])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in some])
        cache, said, notes = DynamicCache(), [], []
        for _ in range(length + 1):
            places = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            state = core(ids, attention_mask=mask, position_ids=places, cache=cache, use_cache=True)[0][:, -1]
            logits = head(state).float()
            notes.append((state.float(), logits.logsumexp(-1), logits.max(-1).values))
            ids = logits.argmax(-1, keepdim=True)
            said.append(ids)
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
        said = torch.cat(said, 1)
        for i in range(len(some)):
            own = said[i].tolist()
            count = own.index(stop) + 1 if stop in own else length
            kept.append(
                {
                    "ids": own[:count],
                    "state": torch.stack([n[0][i] for n in notes[:count]]),
                    "logz": torch.stack([n[1][i] for n in notes[:count]]),
                    "best": torch.stack([n[2][i] for n in notes[:count]]),
                }
            )
    return kept


def dialogues(data, split, wishes, others, count):
    """Return prompts and whether a picture belongs, `count` of each."""
    chosen = sorted(data.split[split], key=lambda i: stable_number(data.concepts[i].code + "dialogue"))
    found = []
    for n in range(count):
        one = data.concepts[chosen[n % len(chosen)]]
        found.append((one.say(wishes[n % len(wishes)]), True))
        found.append((others[n % len(others)].replace("{np}", one.phrase).replace("{name}", one.name), False))
    return list(dict.fromkeys(found))


def answers(name, data, lm, tokenizer, split, dtype):
    path = CACHE / "recipe" / f"answers-{name}-{split}.pt"
    if path.exists():
        return torch.load(path)
    wishes, others, count = {
        "train": (FITTED, NO_PICTURE_FITTED, 200),
        "more": (FITTED, NO_PICTURE_MORE, 110),
        "validation": (CHOOSING, NO_PICTURE_CHOOSING, 60),
        "test": (REPORTED, NO_PICTURE_REPORTED, 60),
    }[split]
    asked = dialogues(data, "train" if split == "more" else split, wishes, others, count)
    if split == "more":
        asked = [one for one in asked if not one[1]]
    start = time.perf_counter()
    kept = answer(lm, tokenizer, [data.chat(text) for text, _ in asked])
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for one, (text, wanted) in zip(kept, asked, strict=True):
        one |= {"asked": text, "wanted": wanted, "end": sentence_end(one["ids"], tokenizer, stop)}
    print(split, len(kept), "answers", round(time.perf_counter() - start), "s", flush=True)
    torch.save(kept, path)
    return kept


def place(one):
    """Return where [RET] belongs: behind the first sentence; None where none ends in what was kept."""
    return one["end"] if one["end"] is not None and one["end"] < len(one["ids"]) else None


def positions(kept):
    """Return states, log Z, best logits and whether [RET] belongs there, of all positions up to its own."""
    parts = []
    for one in kept:
        count = len(one["ids"])
        here = torch.zeros(count)
        if one["wanted"]:
            if place(one) is None:
                continue
            count = place(one) + 1
            here = here[:count]
            here[-1] = 1
        parts.append((one["state"][:count], one["logz"][:count], one["best"][:count], here))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def fit(kept, penalty, weight, margin):
    """Fit the row by weighted logistic regression with the LM's own logits as an offset (convex)."""
    state, logz, best, here = positions(kept)
    offset = margin * best + (1 - margin) * logz
    scale = state.square().mean().sqrt()
    row = torch.zeros(state.shape[1], requires_grad=True)
    weights = torch.where(here > 0, weight * (1 - here).sum() / here.sum(), 1.0)
    optimizer = torch.optim.LBFGS([row], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        lacking = state @ row / scale - offset
        loss = (F.binary_cross_entropy_with_logits(lacking, here, reduction="none") * weights).sum() / weights.sum()
        loss = loss + penalty * row.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    return (row / scale).detach()


def score(kept, row):
    """Return precision and recall of dialogues whose greedy answer says [RET] first where it belongs.

    A dialogue counts as right where the first [RET] comes after the first sentence; one that comes elsewhere, or where
    no picture belongs, is a false one.
    """
    right = said = wanted = 0
    inside = unended = 0
    for one in kept:
        first = (one["state"] @ row > one["best"]).nonzero()[:, 0].tolist()
        if one["wanted"] and place(one) is None:
            unended += 1
            continue
        wanted += one["wanted"]
        if first:
            said += 1
            right += one["wanted"] and first[0] == place(one)
            inside += one["wanted"] and first[0] != place(one)
    return {
        "precision": round(right / max(said, 1), 3),
        "recall": round(right / max(wanted, 1), 3),
        "wanted": wanted,
        "elsewhere": inside,
        "no_sentence_end_in_24_tokens": unended,
        "norm": round(float(row.norm()), 2),
    }


def main():
    name = sys.argv[1]
    lm, tokenizer = load(name)
    lm = lm.to(torch.bfloat16)
    data = Data(tokenizer)

    splits = {s: answers(name, data, lm, tokenizer, s, None) for s in ("train", "more", "validation", "test")}
    for one in splits["validation"][:6] + splits["train"][:6]:
        print(one["wanted"], repr(one["asked"]), one["end"], repr(tokenizer.decode(one["ids"])))
    print("no sentence end", [sum(o["wanted"] and o["end"] is None for o in s) for s in splits.values()])
    # "I want to learn about it" asks for no picture as plainly as the others; with it, definitions get pictures.
    fitted = [o for o in splits["train"] + splits["more"] if not (o["wanted"] and "learn about" in o["asked"])]
    results = {}
    for margin, weight, penalty in ((0.0, 0.3, 1e-4), (0.0, 1.0, 1e-4)):
        row = fit(fitted, penalty, weight, margin)
        results[f"margin {margin}, weight {weight}, penalty {penalty}"] = {
            "fitted": score(fitted, row),
            "validation": score(splits["validation"], row),
        }
    row = fit(fitted, 1e-4, 0.3, 0.0)
    results["test, margin 0.0, weight 0.3, penalty 0.0001"] = score(splits["test"], row)
    for one in splits["test"]:
        first = (one["state"] @ row > one["best"]).nonzero()[:, 0].tolist()
        if first and not one["wanted"]:
            results.setdefault("false on test", []).append(one["asked"])
    print(json.dumps(results, indent=1))
    out = Path(__file__).parent / "results" / f"emission_{name}.json"
    out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
