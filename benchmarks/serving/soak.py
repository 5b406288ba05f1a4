"""32 clients of one `visual-ground serve` of a tiny model for two minutes: what became of each request, and the memory.

python -m benchmarks.serving.soak

Each answer is compared with the one that the same request gets alone. The queue is short, so that some are refused.
"""

from __future__ import annotations

import argparse
import base64
import random
import tempfile
import threading
import time
import urllib.error
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.serving.common import Server, served, tiny_arguments, write

QUEUE = "12"
WORDS = "the number one two three of all pictures is shown here".split()


def requests(folder: Path) -> list[dict[str, Any]]:
    """Return 40 requests of several lengths, with pictures in questions and answers, half of them sampled by seed."""
    drawn = random.Random(0)
    bodies = []
    for i in range(40):
        text = " ".join(drawn.choices(WORDS, k=drawn.randint(1, 12)))
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if i % 4 == 0:
            data = base64.b64encode((folder / f"{i % 8}.png").read_bytes()).decode()
            content.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": drawn.randint(1, 24), "seed": i}
        body["temperature"] = (0, 0.8)[i % 2]
        body |= {"ret_bias": 30, "max_images": 2} if i % 3 == 0 else {}
        bodies.append(body | ({"see_images": True} if i % 6 == 0 else {}))
    return bodies


def said(server: Server, body: dict[str, Any], streams: bool) -> str:
    """Return the text of an answer."""
    if not streams:
        return server.ask(body)["choices"][0]["message"]["content"]
    return "".join(piece["choices"][0]["delta"].get("content") or "" for piece in server.pieces(body))


class Load:
    """Clients that ask again as soon as they are answered."""

    def __init__(self, server: Server, bodies: list[dict[str, Any]]) -> None:
        self.server, self.bodies = server, bodies
        self.alone = [said(server, body, streams=False) for body in bodies]
        self.outcomes: Counter[str] = Counter()
        self._lock = threading.Lock()

    def client(self, number: int, until: float) -> None:
        """Ask until then; wait a moment where the server says so."""
        drawn = random.Random(number)
        while time.monotonic() < until:
            i = drawn.randrange(len(self.bodies))
            try:
                text = said(self.server, self.bodies[i], streams=drawn.random() < 0.5)
                outcome = "answered" if text == self.alone[i] else "another answer than alone"
            except urllib.error.HTTPError as error:
                outcome = "refused with 429" if error.code == 429 and error.headers["Retry-After"] else "failed"
                time.sleep(0.1)
            except Exception as error:
                outcome = f"lost: {type(error).__name__}"
            with self._lock:
                self.outcomes[outcome] += 1


def measure(clients: int, seconds: float) -> dict[str, Any]:
    """Run the load, and read the server's memory every few seconds."""
    with tempfile.TemporaryDirectory() as name:
        arguments = [*tiny_arguments(Path(name)), "--max-waiting", QUEUE]
        with served(arguments) as server:
            load = Load(server, requests(Path(name)))
            until = time.monotonic() + seconds
            threads = [threading.Thread(target=load.client, args=(i, until)) for i in range(clients)]
            for thread in threads:
                thread.start()
            memory = []
            while time.monotonic() < until:
                time.sleep(seconds / 12)
                memory.append(round(server.resident_mb))
            for thread in threads:
                thread.join()
            batches, answers = (server.metrics[f"visual_ground_{n}_total"] for n in ("batches", "batched_answers"))
    return {
        "clients": clients,
        "seconds": seconds,
        "requests": sum(load.outcomes.values()),
        "outcomes": dict(load.outcomes),
        "answers_a_batch": round(answers / batches, 2),
        "resident_mb": memory,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=120.0)
    options = parser.parse_args()
    write("soak", measure(options.clients, options.seconds))
