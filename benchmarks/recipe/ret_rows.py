"""Which input row of `[RET]` disturbs the LM's own continuation least: nats per token of what it says by itself.

python ret_rows.py        (needs emission.py's answers)
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from data import Data
from lm import CACHE, load
from transformers.cache_utils import DynamicCache

COUNT = 32


@torch.no_grad()
def main() -> None:
    lm, tokenizer = load("smollm2")
    table = lm.get_input_embeddings().weight.detach().clone()
    lm, data = lm.to(torch.bfloat16), Data(tokenizer)
    core, words = lm.get_decoder(), lm.get_input_embeddings()
    row = lambda text: table[list(data.ids(text))].mean(0)  # noqa: E731
    mean = table.mean(0)
    candidates = {
        "mean embedding": mean,
        "mean embedding at the mean norm": mean / mean.norm() * table.norm(dim=-1).mean(),
        "newline": row("\n"),
        "two newlines": row("\n\n"),
        "space": row(" "),
        "full stop": row("."),
        "newline and full stop": (row("\n") + row(".")) / 2,
        "end of turn": row("<|im_end|>"),
        "colon": row(":"),
        "bracket": row(" ["),
    }
    kept = [o for s in ("train", "validation") for o in torch.load(CACHE / f"recipe/answers-smollm2-{s}.pt")]
    kept = [o for o in kept if o["wanted"] and o["end"] and len(o["ids"]) - o["end"] >= 5][:COUNT]
    extra = torch.stack(list(candidates.values())).to(torch.bfloat16)[:, None]
    totals, firsts, count = torch.zeros(len(candidates) + 1), torch.zeros(len(candidates) + 1), 0
    for one in kept:
        before, after = [*data.chat(one["asked"]), *one["ids"][: one["end"]]], torch.tensor(one["ids"][one["end"] :])
        cache = DynamicCache()
        last = core(inputs_embeds=words(torch.tensor([before])), cache=cache, use_cache=True).last_hidden_state[:, -1:]
        wide = DynamicCache()
        for n, layer in enumerate(cache.layers):
            shape = (len(candidates), -1, -1, -1)
            wide.update(layer.keys.expand(shape), layer.values.expand(shape), n)
        said = words(after[None, :-1])
        with_row = core(
            inputs_embeds=torch.cat([extra, said.expand(len(extra), -1, -1)], 1), cache=wide, use_cache=True
        ).last_hidden_state
        without = torch.cat([last, core(inputs_embeds=said, cache=cache, use_cache=True).last_hidden_state], 1)
        logits = lm.lm_head(torch.cat([without, with_row])).float().log_softmax(-1)
        loss = -logits.gather(-1, after.expand(len(logits), -1)[..., None])[..., 0]
        totals, firsts, count = totals + loss.sum(1), firsts + loss[:, 0], count + len(after)
    names = ["no picture", *candidates]
    result = {
        name: {"nats_per_token": round(float(t) / count, 3), "first_token": round(float(f) / len(kept), 3)}
        for name, t, f in zip(names, totals, firsts, strict=True)
    }
    print(json.dumps(result, indent=1))
    out = Path(__file__).parent / "results" / "ret_rows.json"
    out.write_text(json.dumps({"answers": len(kept), "tokens": count, "rows": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
