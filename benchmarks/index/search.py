"""Exact search of an opened index against a bare product and `topk`, in one run on the same data and threads.

python -m benchmarks.index.search --vectors 1000000 --output benchmarks/index/results/search.json
python -m benchmarks.index.search --vectors 200000 --kind hnsw --output benchmarks/index/results/hnsw_200k.json

With `--kind`, faiss is compared with exact search. The vectors then lie near a space of 16 dimensions, as embeddings of
images do; among vectors that are alike in all 256, no approximate search finds anything.
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
from visual_ground.index.engines.exact import ExactIndex
from visual_ground.index.engines.faiss_index import FaissIndex


def seconds(*calls, repeats=9):
    """Return the median time of each call, taken by turns after one that warms up."""
    times = [[] for _ in calls]
    for turn in range(repeats + 1):
        for call, taken in zip(calls, times, strict=True):
            start = perf_counter()
            call()
            if turn:
                taken.append(perf_counter() - start)
    return [median(taken) for taken in times]


def measure(count: int, width: int) -> dict[str, float | int]:
    """Build, save, open and search an index of random unit vectors."""
    vectors = torch.nn.functional.normalize(torch.randn(count, width), dim=-1)
    one, many = torch.randn(1, width), torch.randn(64, width)
    with tempfile.TemporaryDirectory() as folder:
        ImageIndex(vectors, [f"image {i}" for i in range(count)]).save_pretrained(folder)
        index = ImageIndex.from_pretrained(folder)
        bare, single, batch = seconds(
            lambda: torch.mv(vectors, one[0]).topk(10),
            lambda: index.search(one, 10),
            lambda: index.search(many, 10),
        )
    return {
        "vectors": count,
        "width": width,
        "threads": torch.get_num_threads(),
        "one_query_against_mv_and_topk": round(single / bare, 3),
        "a_query_of_64_against_one_alone": round(batch / 64 / single, 3),
    }


def measure_faiss(count: int, width: int, kind: str) -> dict[str, float | int | str | None]:
    """Build a faiss index, and compare its searches with exact ones."""
    generator = torch.Generator().manual_seed(0)
    latent, noise = torch.randn(16, width, generator=generator), 0.1
    vectors = torch.randn(count + 64, 16, generator=generator) @ latent
    vectors += noise * vectors.std() * torch.randn(vectors.shape, generator=generator)
    vectors = torch.nn.functional.normalize(vectors, dim=-1)
    exact, queries = ExactIndex(vectors[:-64]), vectors[-64:]
    start = perf_counter()
    index = FaissIndex(exact, kind)
    built = perf_counter() - start
    best, found = exact.search(queries, 10).positions, index.search(queries, 10).positions
    one = queries[:1]
    exact_one, fast_one = seconds(lambda: exact.search(one, 10), lambda: index.search(one, 10))
    exact_many, fast_many = seconds(lambda: exact.search(queries, 10), lambda: index.search(queries, 10))
    return {
        "vectors": count,
        "width": width,
        "threads": torch.get_num_threads(),
        "kind": index.kind,
        "effort": index.effort,
        "seconds_to_build": round(built, 1),
        "recall_at_10_measured_when_built": index.recall,
        "recall_at_10_of_64_other_queries": round(
            float((found[:, :, None] == best[:, None]).any(-1).float().mean()), 4
        ),
        "times_faster_one_query": round(exact_one / fast_one, 1),
        "times_faster_64_queries": round(exact_many / fast_many, 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--kind", help="of faiss")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    sizes = options.vectors, options.width
    text = json.dumps(measure_faiss(*sizes, options.kind) if options.kind else measure(*sizes), indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")
