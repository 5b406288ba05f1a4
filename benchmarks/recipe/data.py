"""What the recipe study is about: the demo's concepts, their pictures' features, and what is said of them.

Wordings of requests are in three lists that share none: fitted on, for choosing, and for the report.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from lm import CACHE, Ids, opening
from torch import Tensor

from visual_ground.demo import emoji
from visual_ground.demo.pairs import Pairs
from visual_ground.demo.templates import REPLIES, REQUESTS
from visual_ground.demo.weights import load_vision

FITTED = REQUESTS
CHOOSING = (
    "What does {np} look like?",
    "Got any pictures of {np}?",
    "Could you pull up {np} please?",
    "Let me look at {np}.",
    "How about a picture with {np} in it?",
)
REPORTED = (
    "I'd love to see {np} right now.",
    "Give me an image of {np}.",
    "Is there a drawing of {np} that I could look at?",
    "My daughter wants to know how {np} looks.",
    "Quick, {np}!",
)
# What any captions can be made into requests with, where the data has none.
WRAPPERS = (
    "Show me a picture: {it}.",
    "Can I see this? {it}",
    "Find me an image of {it}, please.",
    "I am looking for a photo or drawing: {it}.",
)


class Data:
    """The concepts and all texts as ids.

    Args:
        tokenizer: the LM's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.concepts = emoji.concepts()
        self.split = {
            s: [i for i, c in enumerate(self.concepts) if c.split == s] for s in ("train", "validation", "test")
        }

    @cached_property
    def features(self) -> Tensor:
        """The pictures' features (concepts, styles, f)."""
        return Pairs(CACHE, load_vision(), None).features.float()

    @cached_property
    def sink(self) -> Ids:
        return opening(self.tokenizer)

    def ids(self, text: str) -> Ids:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()

    def caption(self, text: str, lead: str = "Image:") -> Ids:
        return (*self.sink, *self.ids(f"{lead} {text}" if lead else text))

    def chat(self, said: str) -> Ids:
        if self.tokenizer.chat_template:
            return self.ids(
                self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": said}], tokenize=False, add_generation_prompt=True
                )
            )
        return (*self.sink, *self.ids(f"User: {said}\nAssistant:"))

    def captions(self, kind: int) -> list[str]:
        return [emoji.captions(c)[kind] for c in self.concepts]

    def picked(self, options: tuple[str, ...], salt: str) -> list[str]:
        """One of the options for each concept."""
        return [c.fill(c.pick(options, salt)) for c in self.concepts]

    def replies(self) -> list[str]:
        return self.picked(REPLIES, "reply")


def family(data: Data, name: str) -> list[Ids]:
    """Return the texts of a family, one for each concept."""
    if name.startswith("cap"):
        return [data.caption(text) for text in data.captions(int(name[3]))]
    if name.startswith("fit"):
        return [data.chat(text) for text in data.picked(FITTED, name)]
    if name.startswith("choose"):
        return [data.chat(text) for text in data.picked(CHOOSING, name)]
    if name.startswith("report"):
        return [data.chat(text) for text in data.picked(REPORTED, name)]
    if name.startswith("wrap"):
        from visual_ground.training.initialization.idf import without_sentence_marks as within_a_sentence

        texts = data.captions(int(name[4]))
        options = [WRAPPERS[emoji.stable_number(c.code + name) % len(WRAPPERS)] for c in data.concepts]
        return [data.chat(o.format(it=within_a_sentence(t))) for o, t in zip(options, texts, strict=True)]
    if name.startswith("ans"):
        # An answer in other words than the request: the request's family, then what is said before the picture.
        asked = family(data, {"a": "fita", "v": "choosea", "t": "reporta"}[name[3]])
        return [(*ids, *data.ids(reply)) for ids, reply in zip(asked, data.replies(), strict=True)]
    if name.startswith("own"):
        # The frozen LM's own first sentences (emission.py), where a picture belongs; see `own_concepts`.
        kept = torch.load(CACHE / "recipe" / f"answers-smollm2-{name[3:]}.pt")
        return [(*data.chat(one["asked"]), *one["ids"][: one["end"]]) for one in kept if one["wanted"] and one["end"]]
    raise KeyError(name)


def own_concepts(data: Data, split: str) -> list[int]:
    """Return which concepts the texts of `family(data, "own" + split)` are about."""
    kept = torch.load(CACHE / "recipe" / f"answers-smollm2-{split}.pt")
    found = []
    for one in kept:
        if one["wanted"] and one["end"]:
            named = [i for i in data.split[split] if data.concepts[i].phrase in one["asked"]]
            found.append(max(named, key=lambda i: len(data.concepts[i].phrase)))
    return found


def families(data: Data) -> list[int]:
    """Number the families of names that the demo never splits between training and test (`emoji._split`)."""
    content = [emoji.content_words(c.name) or {c.code} for c in data.concepts]
    parent = list(range(len(content)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for i, one in enumerate(content):
        for j in range(i):
            if content[j] <= one or one <= content[j]:
                parent[root(i)] = root(j)
    return [root(i) for i in range(len(content))]
