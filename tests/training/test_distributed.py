"""Two processes: no example twice, one adapter, evaluated and saved once; the base sharded or not."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.paths import ROOT
from tests.training.spread import ROWS


def launch(folder, kind):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no".split()
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "--main_process_port", port]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "datasets")}
    done = subprocess.run(
        [*command, "-m", "tests.training.spread", str(folder), kind],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{kind}-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_two_processes(tmp_path):
    adapters = {}
    for kind in ("table", "stream", "fsdp"):
        folder = tmp_path / kind
        folder.mkdir()
        one, two = launch(folder, kind)
        assert one["adapter"] == two["adapter"] and one["metrics"] == two["metrics"] and len(one["metrics"]) == 2
        assert one["writes"] and not two["writes"]
        epoch = [rows[0] + rows[1] for rows in (one["rows"], two["rows"])]
        assert not set(epoch[0]) & set(epoch[1]) and (kind == "stream" or sorted(sum(epoch, [])) == list(range(ROWS)))
        said = [{tuple(ids) for ids in found["captions"][:8]} for found in (one, two)]
        assert not said[0] & said[1] and len(said[0] | said[1]) == ROWS
        pictures = sorted(path.name for path in (folder / "run" / "pictures").iterdir())
        assert pictures == ["eval-00000002.png", "eval-00000004.png"]
        checkpoint = folder / "run" / "checkpoint-4"
        assert sum(path.stat().st_size for path in checkpoint.rglob("*")) < 300_000
        adapters[kind] = load_file(checkpoint / "adapter_model.safetensors")
        assert all(name == "Tensor" for name in one["replicated"]) and bool(one["sharded"]) == (kind == "fsdp")
    for name, tensor in adapters["table"].items():
        assert torch.allclose(tensor, adapters["fsdp"][name], rtol=1e-4, atol=1e-5), name


@pytest.mark.slow
def test_two_processes_keep_the_same_best_state(tmp_path):
    one, two = launch(tmp_path, "held_out")
    assert one["adapter"] == two["adapter"] and one["scores"] == two["scores"]
    assert one["best"] == two["best"]
    for name, kept in one["best"].items():
        assert round(kept, 4) == max(entry[f"held_out_{name}"] for entry in one["scores"])
    assert {row for rows in (*one["rows"], *two["rows"]) for row in rows} < set(range(2 * ROWS))
