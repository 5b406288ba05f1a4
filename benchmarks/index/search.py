"""Exact search of an opened index against a bare product and `topk`, in one run on the same data and threads.

python -m benchmarks.index.search --vectors 200000 --output benchmarks/index/results/search.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from visual_ground import ImageIndex


def seconds(call, repeats=7):
    """Return the median time of a call, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    return median(times[1:])


def measure(count: int, width: int) -> dict[str, float | int]:
    """Build, save, open and search an index of random unit vectors."""
    vectors = torch.nn.functional.normalize(torch.randn(count, width), dim=-1)
    one, many = torch.randn(1, width), torch.randn(64, width)
    with tempfile.TemporaryDirectory() as folder:
        ImageIndex(vectors, [f"image {i}" for i in range(count)]).save_pretrained(folder)
        start = perf_counter()
        index = ImageIndex.from_pretrained(folder)
        opened = perf_counter() - start
        bare = seconds(lambda: torch.mv(vectors, one[0]).topk(10))
        single = seconds(lambda: index.search(one, 10))
        batch = seconds(lambda: index.search(many, 10))
    return {
        "vectors": count,
        "width": width,
        "threads": torch.get_num_threads(),
        "seconds_to_open": round(opened, 3),
        "one_query_against_mv_and_topk": round(single / bare, 3),
        "a_query_of_64_against_one_alone": round(batch / 64 / single, 3),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    text = json.dumps(measure(options.vectors, options.width), indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")
