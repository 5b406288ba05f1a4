"""Eight requests at the same time against the same eight one after the other, through `visual-ground serve`.

python -m benchmarks.serving.throughput --demo demo
"""

from __future__ import annotations

import argparse
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

from benchmarks.serving.common import Server, demo_arguments, served, tiny_arguments, write

ROUNDS = 3


@dataclass(frozen=True)
class Cost:
    """What a set of answers costs: seconds of the clock and of the server's processors, tokens, and batches."""

    seconds: float
    used: float
    tokens: int
    batches: int


ASKED = (
    "Tell me about foxes.",
    "What is a violin made of?",
    "Why is the sea salty?",
    "How does one bake bread?",
    "Describe a rainy day.",
    "What do penguins eat?",
    "Who invented the telephone?",
    "Explain how a bicycle stays upright.",
)


def run(server: Server, max_tokens: int, together: bool) -> tuple[Cost, list[str]]:
    """Ask all; return what it costs, and the texts of the answers."""
    bodies = [
        {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, "temperature": 0, "max_images": 1}
        for text in ASKED
    ]
    used, start, batches = server.processor_seconds, perf_counter(), server.metrics["visual_ground_batches_total"]
    with ThreadPoolExecutor(len(bodies) if together else 1) as pool:
        answers = list(pool.map(server.ask, bodies))
    seconds, used = perf_counter() - start, server.processor_seconds - used
    tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
    batches = server.metrics["visual_ground_batches_total"] - batches
    return Cost(seconds, used, tokens, int(batches)), [one["choices"][0]["message"]["content"] for one in answers]


def measure(arguments: list[str], max_tokens: int) -> dict[str, object]:
    """Run both by turns on one server."""
    with served(arguments) as server:
        ways = [partial(run, server, max_tokens, together) for together in (False, True)]
        texts = [way()[1] for way in ways]
        rounds = [[way()[0] for way in ways] for _ in range(ROUNDS)]
    alone, together = zip(*rounds, strict=True)
    return {
        "max_tokens": max_tokens,
        "tokens": together[0].tokens,
        "one_after_the_other_s": [round(one.seconds, 2) for one in alone],
        "at_the_same_time_s": [round(one.seconds, 2) for one in together],
        "batches_at_the_same_time": [one.batches for one in together],
        "throughput_ratio": round(median(a.seconds / b.seconds for a, b in rounds), 2),
        "processor_seconds_ratio": round(median(a.used / b.used for a, b in rounds), 2),
        "same_answers": texts[0] == texts[1],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="where `make demo` wrote")
    parser.add_argument("--max-tokens", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = {"tiny": measure(tiny_arguments(Path(folder)), options.max_tokens)}
    results["smollm2-135m-instruct"] = measure(demo_arguments(options.demo), options.max_tokens)
    write("throughput", results)
