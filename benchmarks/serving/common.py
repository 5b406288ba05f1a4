"""What the serving scripts share: a server in a process of its own, how it is asked, and where results go."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.measure import machine
from tests.golden_parts import saved_parts
from visual_ground import ImageIndex, ground

RESULTS = Path(__file__).parent / "results"
START_SECONDS = 300


def tiny_arguments(folder: Path) -> list[str]:
    """Save an untrained adapter for a tiny LM, and an index, in a folder; return the arguments of a server of them."""
    lm, vision, _ = saved_parts(folder)
    model = ground(lm, vision)
    model.save_pretrained(folder / "adapter")
    ImageIndex.build(model, sorted(map(str, folder.glob("*.png")))).save_pretrained(folder / "index")
    return [lm, str(folder / "adapter"), "--index", str(folder / "index"), "--images", str(folder)]


def demo_arguments(demo: Path) -> list[str]:
    """Return the arguments of a server of SmolLM2-135M-Instruct with what `make demo` left in a folder."""
    lm = demo / "cache" / "smollm2-135m-instruct"
    return [str(lm), str(demo / "adapter"), "--index", str(demo / "index")]


class Server:
    """A running `visual-ground serve`."""

    def __init__(self, arguments: list[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "visual_ground", "serve", *arguments, "--port", str(self.port)]
        quiet = {**os.environ, "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(command, env=quiet, stderr=subprocess.DEVNULL)

    def wait(self) -> None:
        """Wait until it answers."""
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until and self.process.poll() is None:
            with suppress(OSError), self.open("/health"):
                return
            time.sleep(0.2)
        raise RuntimeError("the server did not start")

    def open(self, path: str, body: Any = None) -> Any:
        """Return the answer to a request, to be read."""
        data = None if body is None else json.dumps(body).encode()
        form = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, form)
        return urllib.request.urlopen(request, timeout=START_SECONDS)

    def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the whole answer to a chat request."""
        with self.open("/v1/chat/completions", body) as answer:
            return json.loads(answer.read())

    def pieces(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the pieces of a streamed answer."""
        with self.open("/v1/chat/completions", {**body, "stream": True}) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])

    @property
    def processor_seconds(self) -> float:
        """What it has used of the processors; the clock also counts what others on the machine do."""
        user, system = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers of `/metrics`."""
        with self.open("/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return {line.split()[0]: float(line.split()[1]) for line in lines if line[0] != "#"}

    @property
    def resident_mb(self) -> float:
        """The memory that it holds, in MB."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE") / 1e6


@contextmanager
def served(arguments: list[str]) -> Iterator[Server]:
    """Run a server in a block."""
    server = Server(arguments)
    try:
        server.wait()
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def write(name: str, values: dict[str, Any]) -> None:
    """Print results and write them to results/NAME.json, with the machine."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({**values, "machine": machine()}, indent=2)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)
