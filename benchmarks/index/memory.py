"""Time to open a large index, and peak memory while it is built, opened and searched, against the size of its file.

python -m benchmarks.index.memory --vectors 1000000 --described --output benchmarks/index/results/memory_1m.json
python -m benchmarks.index.memory --vectors 10000000 --output benchmarks/index/results/memory_10m.json

Each step is a process of its own, so that its peak is its own. Resident memory counts the pages of the mapped file that
were read, which the system can take back at any time; anonymous memory does not. Entries have numbers for ids, and with
`--described` names, addresses, captions, licences and years.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from time import perf_counter, process_time, sleep

import numpy as np
import torch

PART = 100_000


class Watched(threading.Thread):
    """Samples a process's anonymous memory."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0.0

    def run(self) -> None:
        """Sample until the process ends."""
        while True:
            lines = Path("/proc/self/status").read_text().splitlines()
            now = next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("RssAnon"))
            self.most = max(self.most, now)
            sleep(0.005)


def described(start: int, size: int) -> dict[str, list]:
    """Return what entries stand for, as an index of photos from the web has it."""
    numbers = range(start, start + size)
    words = "cat dog boat beach tree house mountain river street flower bird car".split()
    captions = [f"a {words[i % 12]} near a {words[i // 12 % 12]} by a {words[i // 144 % 12]}" for i in numbers]
    return {
        "ids": [f"photo-{i:09d}" for i in numbers],
        "images": [f"https://images{i % 7}.example.org/originals/{i:09d}.jpg" for i in numbers],
        "metadata": [
            {"caption": caption, "licence": "CC BY 4.0", "credit": f"author {i % 5000}", "year": 1990 + i % 35}
            for i, caption in zip(numbers, captions, strict=True)
        ],
    }


def build(folder: Path, count: int, width: int, with_words: int) -> dict[str, float]:
    """Save an index of random float16 unit vectors, whose parts are joined as `build_index` joins its own."""
    from visual_ground.index.engines.exact import ExactIndex
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
        given = described(start, size) if with_words else dict.fromkeys(("ids", "images", "metadata"))
        segments += make_entries(**given, count=size, first=start).segments
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

    start, processed = perf_counter(), process_time()
    index = ImageIndex.from_pretrained(folder)
    seconds = {"seconds_to_open": perf_counter() - start, "processor_seconds_to_open": process_time() - processed}
    return {**seconds, "entries": len(index)}


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


def measure(count: int, width: int, with_words: bool) -> dict[str, object]:
    """Run all steps."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps = {"import": step("import", folder), "build": step("build", folder, count, width, int(with_words))}
        size = (folder / "index.safetensors").stat().st_size / 1e9
        table = round((folder / "entries.parquet").stat().st_size / 1e9, 3)
        steps |= {"open": step("open", folder), "search_one": step("search", folder, 1)}
        steps["search_64"] = step("search", folder, 64)
    imports = steps["import"]["peak_gb"]
    for one in steps.values():
        one["peak_against_the_file"] = one["peak_gb"] / size
        one["peak_beyond_the_imports_against_the_file"] = (one["peak_gb"] - imports) / size
    rounded = {name: {key: round(value, 3) for key, value in one.items()} for name, one in steps.items()}
    about = {"vectors": count, "width": width, "dtype": "float16", "described": with_words, "file_gb": round(size, 3)}
    return {**about, "table_gb": table, "load_average": round(os.getloadavg()[2], 1), **rounded}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--described", action="store_true", help="with names, addresses and captions")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        name, folder, *numbers = options.step
        watched = Watched()
        watched.start()
        result = STEPS[name](Path(folder), *map(int, numbers))
        result["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(json.dumps({**result, "peak_anonymous_gb": watched.most}))
    else:
        text = json.dumps(measure(options.vectors, options.width, options.described), indent=2)
        print(text)
        if options.output:
            options.output.write_text(text + "\n")
