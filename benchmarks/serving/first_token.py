"""How long the first token of a streamed answer takes, against the bare LM's with transformers' own streamer.

python -m benchmarks.serving.first_token --demo demo

The prompt is the same for both, as ids. The bare LM is transformers' `generate`, which says its first token to a
streamer; `model.stream` has an index, and says it as text.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from transformers.generation.streamers import BaseStreamer

from benchmarks.serving.common import demo_arguments, served, write
from visual_ground.demo.saved import load_demo
from visual_ground.model import GroundedModel

ROUNDS = 9
QUESTIONS = {"short": "Why is the sea salty?", "long": "Why is the sea salty, and how do the fish live in it? " * 30}


class FirstToken(BaseStreamer):
    """Notes when the first token of an answer comes."""

    def __init__(self) -> None:
        self.calls, self.seconds = 0, 0.0

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, and then each token."""
        self.calls += 1
        if self.calls == 2:
            self.seconds = perf_counter()

    def end(self) -> None:
        """Take the end."""


def of_bare_lm(model: GroundedModel, chat: list[dict[str, str]]) -> float:
    """Return the seconds until the bare LM's first token, from ids."""
    batch, streamer = model.prepare([chat]), FirstToken()
    start = perf_counter()
    options = {"attention_mask": batch["attention_mask"], "max_new_tokens": 2, "do_sample": False}
    with model.disable_adapter():
        model.lm.generate(input_ids=batch["input_ids"], streamer=streamer, **options)
    return streamer.seconds - start


def of_stream(model: GroundedModel, chat: list[dict[str, str]], index: object) -> float:
    """Return the seconds until the first part of `model.stream`, from messages."""
    start = perf_counter()
    parts = model.stream([chat], index, max_new_tokens=4, do_sample=False)
    next(parts)
    seconds = perf_counter() - start
    parts.close()
    return seconds


def of_server(server, chat: list[dict[str, str]]) -> float:
    """Return the seconds until the first text of the server's stream."""
    start = perf_counter()
    pieces = server.pieces({"messages": chat, "max_tokens": 4, "temperature": 0})
    seconds = next(perf_counter() for piece in pieces if piece["choices"][0]["delta"].get("content")) - start
    list(pieces)
    return seconds


def measure(demo: Path) -> dict[str, object]:
    """Take turns."""
    model, index = load_demo(demo, demo / "cache")
    results: dict[str, object] = {}
    with served(demo_arguments(demo)) as server:
        for name, question in QUESTIONS.items():
            chat = [{"role": "user", "content": question}]
            rounds = [
                (of_bare_lm(model, chat), of_stream(model, chat, index), of_server(server, chat))
                for _ in range(ROUNDS + 1)
            ][1:]
            results[name] = {
                "prompt_tokens": model.prepare([chat])["input_ids"].shape[1],
                "bare_lm_s": round(median(bare for bare, _, _ in rounds), 3),
                "stream_ratio": round(median(stream / bare for bare, stream, _ in rounds), 3),
                "server_ratio": round(median(server / bare for bare, _, server in rounds), 3),
            }
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="where `make demo` wrote")
    write("first_token", measure(parser.parse_args().demo))
