"""When `[RET]` is said in a chat that has shown a picture, and in the same chat without it, by a saved demo adapter.

    RECIPE_CACHE=demo/cache python after_a_picture.py ADAPTER validation|test [own|other]

Each of 60 chats is about a seen thing, in words that were not fitted on (those of benchmarks/emission.py, or with
"other" the second author's in other_wordings.py): a request,
the first sentence of the LM's answer, the thing's Twemoji picture, perhaps the next sentence, and then a request for
another thing, or something else. Counts as benchmarks/emission.py does. Writes results/after_a_picture.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from adapters import load_adapter
from lm import CACHE

from visual_ground.demo import emoji
from visual_ground.training.initialization.answers import CONTINUATION, answers_to, place_of_picture
from visual_ground.training.initialization.dialogues import Shown

sys.path.insert(0, str(Path(__file__).parents[1]))
import emission
import other_wordings
from emission import filled, score

COUNT, TWEMOJI = 60, 1


@torch.no_grad()
def main() -> None:
    """Chat, count, write."""
    (model, pairs), (split, author) = load_adapter(sys.argv[1]), (*sys.argv[2:], "own")[:2]
    words = other_wordings if author == "other" else emission
    seen = sorted(pairs.numbers("train"), key=lambda i: emoji.stable_number(pairs.concepts[i].code + "evaluate"))
    chosen = seen[:COUNT] if split == "validation" else seen[COUNT : 2 * COUNT]
    concepts = [pairs.concepts[i] for i in chosen]
    others = concepts[1:] + concepts[:1]
    requests = filled(words.WORDINGS[split], concepts)
    folder = CACHE / "answers"
    first = answers_to(model, requests, filled(words.OTHERS[split], concepts), folder, True)
    ends = [place_of_picture(model, answer) for answer in first[: len(requests)]]
    said, rests = [], []
    for answer, end in zip(first, ends, strict=False):
        said.append(model.tokenizer.decode(answer.ids[:end]).strip() if end else "Here it is.")
        rest = model.tokenizer.decode(answer.ids[end:]) if end else ""
        rests.append(rest[: max(rest.rfind("."), 0) + 1].strip() or said[-1])
    rows = model.active.image_tokens(image_features=pairs.features[chosen, TWEMOJI])
    tokens = {str(n): row for n, row in enumerate(rows.split(model.config.num_visual_tokens))}
    found, everything = {"first turns": score(model, first)}, [*first]
    histories = {
        "after a picture": [Shown(text, str(n)) for n, text in enumerate(said)],
        "after a picture and more text": [
            Shown(text, str(n), rest) for n, (text, rest) in enumerate(zip(said, rests, strict=True))
        ],
        "after text": said,
    }
    for name, behind in histories.items():
        asked, unasked = (
            list(zip(requests, behind, filled(wordings[split], others), strict=True))
            for wordings in (words.NEXT, words.NEXT_OTHERS)
        )
        answers = answers_to(model, asked, unasked, folder, True, CONTINUATION, tokens)
        found[name] = score(model, answers)
        everything += answers
    found["all"] = score(model, everything)
    for one in found.values():
        del one["wrong"]
    print(json.dumps(found, indent=1))
    out = Path(__file__).parent / "results" / "after_a_picture.json"
    known = json.loads(out.read_text()) if out.exists() else {}
    out.write_text(json.dumps({**known, f"{Path(sys.argv[1]).name}, {split}, {author}": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
