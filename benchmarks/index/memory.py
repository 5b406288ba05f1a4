"""Time to open a large index, and peak memory while it is built, opened and searched, against the size of its file.

python -m benchmarks.index.memory --vectors 10000000 --output benchmarks/index/results/memory.json

Each step is a process of its own, so that its peak is its own. Resident memory counts the pages of the mapped file that
were read, which the system can take back at any time.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

PART = 500_000


def build(folder: Path, count: int, width: int) -> dict[str, float]:
    """Save an index of random float16 unit vectors, whose parts are joined as `build_index` joins its own."""
    from visual_ground.index.exact import ExactIndex
    from visual_ground.index.files import write_index
    from visual_ground.index.state import IndexState
    from visual_ground.index.table.entries import Entries, make_entries

    parts, segments = [], []
    for start in range(0, count, PART):
        size = min(PART, count - start)
        generator = torch.Generator().manual_seed(start)
        vectors = torch.nn.functional.normalize(torch.randn(size, width, generator=generator), dim=-1).half()
        ExactIndex(vectors).save(folder / f"{start}.part")
        parts.append(ExactIndex.load(folder / f"{start}.part"))
        segments += make_entries(None, None, None, size, start).segments
    start = perf_counter()
    entries = Entries(tuple(segments), np.zeros(count, dtype=bool), False, False, count)
    write_index(folder, IndexState(ExactIndex.of_blocks(parts), entries))
    seconds = perf_counter() - start
    for path in folder.glob("*.part"):
        path.unlink()
    return {"seconds_to_save": seconds}


def open_index(folder: Path) -> dict[str, float]:
    """Open the index, and look at nothing."""
    from visual_ground import ImageIndex

    start = perf_counter()
    index = ImageIndex.from_pretrained(folder)
    return {"seconds_to_open": perf_counter() - start, "entries": len(index)}


def search(folder: Path, queries: int) -> dict[str, float]:
    """Open and search the index."""
    from visual_ground import ImageIndex

    index = ImageIndex.from_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    vectors = torch.nn.functional.normalize(torch.randn(queries, index.dim, generator=generator), dim=-1)
    index.search(vectors[:1], 10)  # Reads the file.
    start = perf_counter()
    index.search(vectors, 10)
    return {"seconds_to_search": perf_counter() - start, "queries": queries}


def only_import(folder: Path) -> dict[str, float]:
    """Import what is needed, and do nothing."""
    import visual_ground.index.files  # noqa: F401

    return {}


STEPS = {"import": only_import, "build": build, "open": open_index, "search": search}


def step(name: str, folder: Path, *numbers: int) -> dict[str, float]:
    """Run a step in a process of its own, and return its numbers with its peak memory in GB."""
    command = [sys.executable, "-m", "benchmarks.index.memory", "--step", name, str(folder), *map(str, numbers)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(count: int, width: int) -> dict[str, object]:
    """Run all steps."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps = {"import": step("import", folder), "build": step("build", folder, count, width)}
        size = (folder / "index.safetensors").stat().st_size / 1e9
        steps |= {"open": step("open", folder), "search_one": step("search", folder, 1)}
        steps["search_64"] = step("search", folder, 64)
    imports = steps["import"]["peak_gb"]
    for one in steps.values():
        one["beyond_the_imports_against_the_file"] = (one["peak_gb"] - imports) / size
    rounded = {name: {key: round(value, 3) for key, value in one.items()} for name, one in steps.items()}
    return {"vectors": count, "width": width, "dtype": "float16", "file_gb": round(size, 3), **rounded}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        name, folder, *numbers = options.step
        result = STEPS[name](Path(folder), *map(int, numbers))
        result["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(json.dumps(result))
    else:
        text = json.dumps(measure(options.vectors, options.width), indent=2)
        print(text)
        if options.output:
            options.output.write_text(text + "\n")
