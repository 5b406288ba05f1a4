"""The 100 answers of a round of a dialogue: the prompt read once for all of them, against once for each.

python benchmarks/candidates.py
"""

from __future__ import annotations

import random

import torch
from attaching import Eye, llama, pixels, words
from measure import alternate, write
from PIL import Image
from tokenizers import pre_tokenizers

from visual_ground import ground
from visual_ground.scoring.candidates import CandidateScorer

# The lengths of VisDial: ten rounds of about six and three words, of which the fifth is asked here.
ROUNDS_BEFORE, QUESTION, ANSWER, CANDIDATES, LONGEST = 5, 8, 5, 100, 12
SHAPE = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
)


@torch.no_grad()
def main() -> None:
    """Time both ways on a random LM of SmolLM2-135M's shape, by turns, and compare their numbers."""
    torch.manual_seed(0)
    chance = random.Random(0)
    say = lambda count: " ".join(f"w{chance.randrange(1, 49000)}" for _ in range(count))  # noqa: E731
    tokenizer = words(49152)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model = ground(llama(**SHAPE), Eye(), tokenizer, pixels).eval()
    turns = [say(QUESTION + ANSWER) for _ in range(ROUNDS_BEFORE)] + [say(QUESTION)]
    prompt = [Image.new("RGB", (8, 8)), "\n".join(turns)]
    answers = [say(chance.randint(1, LONGEST)) for _ in range(CANDIDATES)]
    encoded = model.processor.encode(prompt)
    scorer = CandidateScorer(model.frozen_lm, model.active)

    def from_scratch() -> torch.Tensor:
        size = scorer.batch_size
        parts = [answers[start : start + size] for start in range(0, len(answers), size)]
        return torch.cat([model.log_likelihood([prompt] * len(part), part) for part in parts])

    difference = float((scorer.score(encoded, answers) - from_scratch()).abs().max())
    times = alternate(lambda: scorer.score(encoded, answers), from_scratch, rounds=3)
    found = {
        "prompt_tokens": len(encoded.ids),
        "candidates": CANDIDATES,
        "shared_s": times["first_s"],
        "from_scratch_s": times["second_s"],
        "times_faster": times["ratio"],
        "largest_difference": difference,
        "prompt_is_shared": scorer.shares_prompt,
    }
    write("candidates", found)


if __name__ == "__main__":
    main()
