"""`visual-ground serve`, killed under load: the adapter and the index are as they were, and it starts again."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

import pytest

from tests.golden_parts import saved_parts
from tests.paths import ROOT
from visual_ground import ImageIndex, ground

REQUEST = {"messages": [{"role": "user", "content": "Show me one."}], "max_tokens": 30, "max_images": 1, "ret_bias": 50}
PATIENCE = 300  # Seconds, for the slowest of machines.


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def ask(port):
    body = json.dumps(REQUEST).encode()
    form = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", body, form)
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        return json.loads(answer.read())["choices"][0]["message"]["content"]


class Server:
    """A server in a process of its own."""

    def __init__(self, *arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "visual_ground", "serve", *map(str, arguments), "--port", str(self.port)]
        self.process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and self.process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health"):
                return
            time.sleep(0.1)
        raise AssertionError("the server did not start")

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.mark.slow
def test_a_server_that_is_killed_under_load_harms_nothing(tmp_path):
    lm, vision, _ = saved_parts(tmp_path)
    model = ground(lm, vision)
    model.save_pretrained(tmp_path / "adapter")
    ImageIndex.build(model, sorted(map(str, tmp_path.glob("*.png")))).save_pretrained(tmp_path / "index")
    before = [contents(tmp_path / name) for name in ("adapter", "index")]
    arguments = lm, tmp_path / "adapter", "--index", tmp_path / "index", "--images", tmp_path
    server, answered = Server(*arguments), threading.Event()

    def load():
        with suppress(OSError, ValueError, HTTPException):  # Until it is gone, maybe in the middle of an answer.
            while True:
                ask(server.port)
                answered.set()

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    has_answered = answered.wait(PATIENCE)
    server.kill()
    assert has_answered
    for thread in threads:
        thread.join()
    assert [contents(tmp_path / name) for name in ("adapter", "index")] == before
    server = Server(*arguments)
    try:
        assert isinstance(ask(server.port), str)
    finally:
        server.kill()
