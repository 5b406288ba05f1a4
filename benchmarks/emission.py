"""When `[RET]` is said: precision and recall on dialogues in words that were not fitted on.

    python benchmarks/emission.py --cache demo/cache --split validation

A dialogue counts as right where the first `[RET]` of its greedy answer comes behind the first sentence; answers whose
first sentence does not end within `MAX_NEW_TOKENS` are counted apart. `by_dialogue` asks only whether an answer has a
`[RET]` where a picture was asked for, behind whatever sentence and however long the first one is.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from visual_ground import ground
from visual_ground.demo import emoji
from visual_ground.demo.weights import load_lm
from visual_ground.training.initialization import emission
from visual_ground.training.initialization.answers import answers_to, place_of_picture
from visual_ground.training.initialization.ret_input import own_logits

WORDINGS = {
    "validation": (
        "What does {np} look like?",
        "Got any pictures of {np}?",
        "Could you pull up {np} please?",
        "Let me look at {np}.",
        "How about a picture with {np} in it?",
    ),
    "test": (
        "I'd love to see {np} right now.",
        "Give me an image of {np}.",
        "Is there a drawing of {np} that I could look at?",
        "My daughter wants to know how {np} looks.",
        "Quick, {np}!",
    ),
}
OTHERS = {
    "validation": (
        "What is the boiling point of water?",
        "Can you help me with my homework?",
        "Which is larger, 9 or 11?",
        "Write an email to my boss saying that I am ill.",
        "Who was the first president of the United States?",
        "What is the plural of {name}?",
        "Should I worry about {np}?",
        "How many kinds of {name} are there?",
        "When was {np} first mentioned in a book?",
        "Good night!",
    ),
    "test": (
        "What is the square root of 81?",
        "How can I learn to swim?",
        "Tell me a joke.",
        "What is the opposite of cold?",
        "When did the Second World War end?",
        "What is the best way to save money?",
        "Say the word {name} twice.",
        "Is it rude to talk about {np}?",
        "What would you do without {np}?",
        "How do I pronounce {name}?",
    ),
}

# Second turns, behind a request or something else (in other words too) and the first sentence of the LM's answer.
NEXT = {
    "validation": ("Then {np}.", "Could I have a look at {np} now?", "One more: {np}.", "How about {np}?"),
    "test": ("And {np}, please.", "Do you have {np} too?", "I want to see {np} next.", "Good. {np}?"),
}
NEXT_OTHERS = {
    "validation": ("Okay.", "How do you know?", "Is that true?", "How big is it?", "Do you like {np}?"),
    "test": ("Which of the two is heavier?", "Great, thanks a lot.", "What is it made of?", "Can {np} be dangerous?"),
}


class Eye(torch.nn.Module):
    """Stands for a vision encoder, which nothing here looks through."""

    def forward(self, pixels):
        """Return pixels (n, c, h, w) as features (n, 8)."""
        return pixels.flatten(1)[:, :8]


def filled(texts, concepts):
    """Put concepts into wordings, in turns."""
    return [texts[i % len(texts)].replace("{np}", c.phrase).replace("{name}", c.name) for i, c in enumerate(concepts)]


def first_turns(wordings, concepts):
    """Put concepts into wordings, in turns; each text once."""
    return list(dict.fromkeys(filled(wordings, concepts)))


def second_turns(model, split, concepts, answers, folder):
    """Return answers to second turns: requests and others, each behind a first turn of either kind and its answer."""
    firsts = [*first_turns(WORDINGS[split], concepts), *first_turns(OTHERS[split], concepts)]
    ends = [place_of_picture(model, answer) for answer in answers]
    said = [
        (text, model.tokenizer.decode(answer.ids[:end]).strip())
        for text, answer, end in zip(firsts, answers, ends, strict=True)
        if end
    ]
    turned = [said[(5 * i) % len(said)] for i in range(len(concepts))]  # As many of each kind as there are.
    others = concepts[1:] + concepts[:1]
    asked, unasked = (
        [(*first, text) for first, text in zip(turned, filled(wordings, others), strict=True)]
        for wordings in (NEXT[split], NEXT_OTHERS[split])
    )
    return answers_to(model, asked, unasked, folder)


@torch.no_grad()
def said_at(model, answer):
    """Return the place of the first `[RET]` in a greedy answer, or None."""
    states = answer.states.to(model.adapter.ret_output.device)
    said = states @ model.adapter.ret_output + model.adapter.ret_gate(states[:1]) > own_logits(model, states).amax(-1)
    return next(iter(said.nonzero()[:, 0].tolist()), None)


def score(model, answers):
    """Return precision, recall and what they are made of."""
    right = said = wanted = unended = shown = 0
    wrong = []
    for answer in answers:
        place, belongs = said_at(model, answer), place_of_picture(model, answer) if answer.wanted else None
        shown += answer.wanted and place is not None
        if answer.wanted and belongs is None:
            unended += 1
            said += place is not None
            continue
        wanted += answer.wanted
        said += place is not None
        right += place is not None and place == belongs
        if place != belongs:
            asked = model.tokenizer.decode([i for i in answer.prompt[-16:] if i >= 0])  # Without pictures.
            wrong.append((asked, model.tokenizer.decode(answer.ids), place, belongs))
    return {
        "precision": round(right / max(said, 1), 3),
        "recall": round(right / max(wanted, 1), 3),
        "by_dialogue": {
            "precision": round(shown / max(said, 1), 3),
            "recall": round(shown / max(wanted + unended, 1), 3),
        },
        "wanted": wanted,
        "first_sentence_does_not_end": unended,
        "others": sum(not answer.wanted for answer in answers),
        "wrong": wrong,
    }


def main():
    """Fit and score."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("demo/cache"))
    parser.add_argument("--split", choices=WORDINGS, default="validation")
    parser.add_argument("--count", type=int, default=60, help="held-out dialogues of each kind")
    parser.add_argument("--requests", type=int, default=160, help="requests that are fitted on")
    parser.add_argument("--bf16", action="store_true", help="run the language model in bfloat16")
    parser.add_argument("--captions-only", action="store_true", help="no requests in the data")
    options = parser.parse_args()
    lm, tokenizer = load_lm(options.cache)
    model = ground(
        lm.to(torch.bfloat16 if options.bf16 else torch.float32),
        Eye(),
        tokenizer,
        image_processor=lambda images, **_: {"pixel_values": torch.zeros(1, 3, 4, 4)},
    )
    concepts = emoji.concepts()
    train = sorted((c for c in concepts if c.split == "train"), key=lambda c: emoji.stable_number(c.code + "dialogue"))
    folder, start = options.cache / "answers", time.perf_counter()
    asked = [] if options.captions_only else train[: options.requests]
    requests = {emoji.request(c): emoji.captions(c)[0] for c in asked}
    begun = emission.fit_ret_input(model, [emoji.captions(c)[0] for c in train], requests, folder)
    emission.fit_ret_output(model, begun, folder=folder)
    print("fitted", round(time.perf_counter() - start), "s; norms", model.adapter.ret_norms.tolist(), flush=True)
    held = sorted((c for c in concepts if c.split == options.split), key=lambda c: emoji.stable_number(c.code))[
        : options.count
    ]
    asked, others = (first_turns(wordings[options.split], held) for wordings in (WORDINGS, OTHERS))
    answers = answers_to(model, asked, others, folder)
    result = score(model, answers)
    for name, number in (("without a system message", 0), ("with ILLUSTRATED", 1)):
        # Every second dialogue of each kind has the system message.
        result[name] = {k: v for k, v in score(model, answers[number::2]).items() if k != "wrong"}
    result["second turns"] = score(model, second_turns(model, options.split, held, answers, folder))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
