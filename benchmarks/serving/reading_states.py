"""What it costs to read the retrieval state of an answer's picture while the answer is generated.

python -m benchmarks.serving.reading_states --demo demo

The answers have 32 tokens and two pictures, after a history of 500 tokens. A picture is read by the step that follows
its `[RET]`. Noted is how much longer than the median step of the same answer the `[RET]`'s step and the following one
take, as a share of the whole answer: in seconds of the processor, which do not count what else runs on the machine, and
in those of the clock. An answer's first picture is read at three places: behind the answer so far, where the answer
begins, and behind the last question as if nothing had been said before it. The first answer is left out: it also reads
them one by one, to see that this language model can read them together.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

from benchmarks.serving.common import write
from visual_ground.demo.saved import load_demo
from visual_ground.generation.listener import AnswerListener

ROUNDS, HISTORY, ANSWER = 15, 500, 32
ASKED = "Can I see a fox?"
OPTIONS = {"max_images": 2, "ret_bias": 100.0, "min_new_tokens_before_ret": 12, "do_sample": False}


class TimedSteps:
    """Notes when each step of a `generate` ended, on the processor and on the clock, and whether it gave `[RET]`."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []
        self.shows: list[bool] = []
        self._call = AnswerListener.__call__

    def __enter__(self) -> TimedSteps:
        """Begin."""

        def timed(listener, ids, scores=None, **options):
            ended = self._call(listener, ids, scores, **options)
            self.ends.append((process_time(), perf_counter()))
            self.shows.append(int(ids[0, -1]) == listener.attached.processor.ret_token_id)
            return ended

        AnswerListener.__call__ = timed
        return self

    def __exit__(self, *error: object) -> None:
        """End."""
        AnswerListener.__call__ = self._call

    def costs(self) -> list[tuple[float, float]]:
        """Return what each picture took beyond two steps of the median length, in both kinds of seconds."""
        steps = [[b[i] - a[i] for a, b in zip(self.ends, self.ends[1:], strict=False)] for i in (0, 1)]
        # Step k is between the ends k and k + 1, so the one that gave `[RET]` is one before its place.
        places = [place for place, shows in enumerate(self.shows) if shows]
        return [tuple(sum(one[k - 1 : k + 1]) - 2 * median(one) for one in steps) for k in places]


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
        with TimedSteps() as timed:
            clock, processor = perf_counter(), process_time()
            model.generate([chat], index, **options)
            whole = process_time() - processor, perf_counter() - clock
        shares.append([spent / all_of_it for one in timed.costs() for spent, all_of_it in zip(one, whole, strict=True)])
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
