"""How long a newcomer's first training takes: 200 pairs and 20 steps of a 135 M LM by `visual-ground train`.

    python benchmarks/training/newcomer.py [--cache demo/cache] [--pairs 200] [--steps 20] [--no-bf16]

The pictures are the demo's emoji in new files, so that no feature of them is known. The command runs in a process of
its own, on two cores, and starts from nothing; what it prints is kept with the time at which each stage began. Wall and
processor seconds are both noted: on a machine that others use too, the processor's are the steadier ones.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from visual_ground.demo import emoji
from visual_ground.demo.weights import LM_NAME, load_lm, load_vision
from visual_ground.lm.base.loading import multiplies_bfloat16

sys.path.insert(0, str(Path(__file__).parent.parent))
from measure import write

CORES = 2


def write_pairs(folder: Path, cache: Path, count: int) -> Path:
    """Write a table of pictures and captions, and the pictures beside it; return its path."""
    chosen = emoji.concepts()[:count]
    with open(folder / "pairs.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption"])
        for number, concept in enumerate(chosen):
            name = f"{number:03d}.png"
            shutil.copy(emoji.render(concept, emoji.STYLES[0], cache / "emoji"), folder / name)
            table.writerow([name, emoji.captions(concept)[0]])
    return folder / "pairs.csv"


def stages(lines: list[tuple[float, str]]) -> list[dict[str, float | str]]:
    """Return when each stage began, in seconds from the start."""
    seen: dict[str, float] = {}
    for at, line in lines:
        if found := re.match(r"(.+): (\d+ of \d+ .+ )?starts$", line):
            seen.setdefault(found[1], round(at, 1))
    return [{"stage": name, "began_after_s": at} for name, at in seen.items()]


def run(command: list[str], environment: dict[str, str]) -> tuple[int, list[tuple[float, str]]]:
    """Run a command; return its exit code, and what it printed with the seconds since its start."""
    start, lines = time.perf_counter(), list[tuple[float, str]]()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append((time.perf_counter() - start, line.rstrip()))
    return process.returncode, lines


def main() -> None:
    """Train once, and write what it took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cache", type=Path, default=Path("demo/cache"))
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="as the command's own")
    options = parser.parse_args()
    load_lm(options.cache)  # Writes the folder that the command is given.
    vision = load_vision(options.cache).name
    assert vision is not None
    environment = {**os.environ, "OMP_NUM_THREADS": str(CORES)}
    with tempfile.TemporaryDirectory() as folder:
        table = write_pairs(Path(folder), options.cache, options.pairs)
        command = [sys.executable, "-m", "visual_ground", "train", str(options.cache / LM_NAME), vision, str(table)]
        command += ["--output", f"{folder}/adapter", "--steps", str(options.steps)]
        command += [] if options.bf16 is None else ["--bf16" if options.bf16 else "--no-bf16"]
        start = time.perf_counter()
        code, lines = run(command, environment)
        wall = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    for at, line in lines[-12:]:
        print(f"{at:6.1f} {line}", file=sys.stderr)
    assert code == 0, f"the command ended with {code}"
    pauses = [later - earlier for (earlier, _), (later, _) in zip([(0.0, ""), *lines], lines, strict=False)]
    processor = used.ru_utime + used.ru_stime
    result = {
        "bf16": multiplies_bfloat16() if options.bf16 is None else options.bf16,
        "pairs": options.pairs,
        "steps": options.steps,
        "cores": CORES,
        "wall_s": round(wall, 1),
    }
    result |= {"processor_s": round(processor, 1), "processor_s_per_core": round(processor / CORES, 1)}
    result |= {"longest_silence_s": round(max(pauses), 1), "stages": stages(lines)}
    write("training_newcomer", {**result, "load_average": round(os.getloadavg()[0], 1)})


if __name__ == "__main__":
    main()
