"""What every benchmark needs: the machine in words, memory, alternating timings, and where results go."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, str | int]:
    """Return the processor, cores and versions."""
    import torch
    import transformers

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {"processor": ", ".join(sorted(names)), "threads": torch.get_num_threads(), **versions}


def resident_mb() -> float:
    """Return the memory that this process holds, in MB."""
    import psutil

    return psutil.Process().memory_info().rss / 1e6


def alternate(first: Callable[[], object], second: Callable[[], object], rounds: int) -> dict[str, float]:
    """Time two calls by turns; return their medians in seconds, and the ratio second / first of the medians."""
    times: tuple[list[float], list[float]] = ([], [])
    for call in (first, second):
        call()
    for _ in range(rounds):
        for call, spent in zip((first, second), times, strict=True):
            start = time.perf_counter()
            call()
            spent.append(time.perf_counter() - start)
    medians = [statistics.median(spent) for spent in times]
    return {
        "first_s": round(medians[0], 4),
        "second_s": round(medians[1], 4),
        "ratio": round(medians[1] / medians[0], 4),
    }


def write(name: str, values: dict) -> None:
    """Print results and write them to results/NAME.json, with the machine."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({**values, "machine": machine()}, indent=2)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)
