"""What it costs to read the retrieval state of an answer's picture while the answer is generated.

python -m benchmarks.serving.reading_states --demo demo

The answers have 32 tokens and two pictures, after a history of 500 tokens. Noted are the seconds inside the listener
that reads the states, as a share of the whole answer's: those of the processor, which do not count what else runs on
the machine, and those of the clock. An answer's first picture is read at three places, in one pass: behind the answer
so far, where the answer begins, and behind the last question as if nothing had been said before it. The first answer
is left out: it also reads them one by one, to see that this language model can read them together.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

from benchmarks.serving.common import write
from visual_ground.demo.saved import load_demo
from visual_ground.generation.listener import AnswerListener

ROUNDS, HISTORY, ANSWER = 7, 500, 32
ASKED = "Can I see a fox?"
OPTIONS = {"max_images": 2, "ret_bias": 100.0, "min_new_tokens_before_ret": 12, "do_sample": False}


class TimedListener:
    """Notes the seconds of each of `AnswerListener`'s readings, of the processor and of the clock."""

    def __init__(self) -> None:
        self.readings: list[tuple[float, float]] = []
        self._read = AnswerListener._read

    def __enter__(self) -> TimedListener:
        """Begin."""

        def timed(listener, ids):
            clock, processor = perf_counter(), process_time()
            found = self._read(listener, ids)
            if found:
                self.readings.append((process_time() - processor, perf_counter() - clock))
            return found

        AnswerListener._read = timed
        return self

    def __exit__(self, *error: object) -> None:
        """End."""
        AnswerListener._read = self._read


def conversation(model) -> list[dict[str, str]]:
    """Return a chat of 500 tokens, with the question at its end."""
    said = "A fox lives in a den under the roots of an old tree and comes out at night to look for mice. "
    messages = [{"role": "user", "content": "Tell me a story."}, {"role": "assistant", "content": ""}]
    messages.append({"role": "user", "content": ASKED})
    while model.prepare([messages])["input_ids"].shape[1] < HISTORY:
        messages[1]["content"] += said
    return messages


def measure(demo: Path) -> dict[str, object]:
    """Answer again and again, and note what the reading has taken of it."""
    model, index = load_demo(demo, demo / "cache")
    chat, options = conversation(model), {**OPTIONS, "max_new_tokens": ANSWER, "min_new_tokens": ANSWER}
    shares: list[list[float]] = []
    model.generate([chat], index, **options)
    for _ in range(ROUNDS):
        with TimedListener() as timed:
            clock, processor = perf_counter(), process_time()
            model.generate([chat], index, **options)
            whole = process_time() - processor, perf_counter() - clock
        shares.append(
            [spent / all_of_it for one in timed.readings for spent, all_of_it in zip(one, whole, strict=True)]
        )
    first, first_clock, later, later_clock = (round(median(column), 4) for column in zip(*shares, strict=True))
    return {
        "history_tokens": model.prepare([chat])["input_ids"].shape[1],
        "answer_tokens": ANSWER,
        "share_of_processor_seconds": {"first_picture": first, "a_later_picture": later},
        "share_of_seconds": {"first_picture": first_clock, "a_later_picture": later_clock},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="where `make demo` wrote")
    write("reading_states", measure(parser.parse_args().demo))
