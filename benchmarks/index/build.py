"""Building an index of JPEG files: its rate against the encoder's own, its memory, and builds that are killed.

python -m benchmarks.index.build rate --images 3000 --output benchmarks/index/results/build_rate.json
python -m benchmarks.index.build kills --images 20000 --output benchmarks/index/results/build_kills.json

The pictures are 640 x 480 and made here, and two processes decode. `rate` builds with EfficientNet-lite0 out of its pip
package, on one thread. The encoder's own rate is measured on ready pixels, by turns with the build: every few batches,
when the decoding processes have filled what waits for the encoder and are idle. The time for it is taken off the
build's. `kills` builds with a small encoder (one layer, random weights), so that 20,000 pictures do not take an hour:
once, and once with five kills, and compares the two indexes byte by byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from io import BytesIO
from pathlib import Path
from statistics import median
from time import monotonic, process_time, sleep

import numpy as np
import torch
from PIL import Image

BATCH, PART, WORKERS = 32, 512, 2
DIFFERENT = 500  # Pictures; the files are all different.
OWN_BATCHES = 4  # Ready ones at each turn.
IDLE = 3.0  # Seconds until the decoding processes have filled the queue.
# A build is killed when this part of its images is done, and once while the finished index is written.
KILLED_AT = (0.04, 0.27, 0.53, 0.78)


def make_pictures(folder: Path, count: int) -> None:
    """Write pictures with soft shapes and grain, as large as photos; those that look alike differ in a comment."""
    folder.mkdir()
    for number in range(min(count, DIFFERENT)):
        draw = np.random.default_rng(number)
        shapes = Image.fromarray(draw.integers(0, 256, (15, 20, 3), dtype=np.uint8)).resize((640, 480))
        grain = draw.integers(-12, 13, (480, 640, 1))
        pixels = (np.asarray(shapes, dtype=np.int16) + grain).clip(0, 255).astype(np.uint8)
        file = BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=85)
        for copy in range(number, count, DIFFERENT):
            comment = b"\xff\xfe\x00\x08%06d" % copy  # Comes behind the two bytes that every JPEG file starts with.
            (folder / f"{copy:06d}.jpg").write_bytes(file.getvalue()[:2] + comment + file.getvalue()[2:])


def grounded_model(cache: Path, small: bool):
    """Return a model with EfficientNet-lite0 or a small encoder; of its LM, tiny and random, an index needs nothing."""
    from tests.tiny import build, tokenizer
    from visual_ground import GroundingConfig, ground
    from visual_ground.demo.weights import load_vision
    from visual_ground.vision.encoder import VisionEncoder

    vision = load_vision(cache)
    torch.manual_seed(0)
    if small:
        layers = torch.nn.Conv2d(3, 64, 32, 32), torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten()
        vision = VisionEncoder(torch.nn.Sequential(*layers), vision.image_processor)
    config = GroundingConfig(retrieval_dim=256, image_prompt="w7 {image} w8")
    return ground(build("llama_untied"), vision, tokenizer(), config=config).eval()


class Watched:
    """A model that measures its encoder's own rate and its memory while an index is built with it.

    Args:
        model: the grounded model.
        every: batches between two measurements; 0 for none.
    """

    def __init__(self, model, every: int) -> None:
        self.model, self.every, self.vision, self.image_space = model, every, model.vision, model.image_space
        self.pixels = torch.randn(BATCH, 3, 224, 224).to(memory_format=torch.channels_last)
        self.batches, self.paused = 0, 0.0
        self.processor_seconds = [0.0, 0.0]  # Of this process for an image, in the build and of the encoder alone.
        self.processed_since = process_time()
        self.own, self.built, self.anonymous = list[float](), list[float](), list[float]()
        self.since = monotonic()

    def embed_images(self, *, image_features):
        """Embed a batch, and measure at every n-th."""
        vectors = self.model.embed_images(image_features=image_features)
        self.batches += 1
        self.anonymous.append(memory("RssAnon"))
        if self.every and self.batches % self.every == 0:
            self._measure()
        return vectors

    def _measure(self) -> None:
        start = monotonic()
        self.built.append(BATCH * self.every / (start - self.since))
        self.processor_seconds[0] += process_time() - self.processed_since
        sleep(IDLE)
        ready, processed = monotonic(), process_time()
        for _ in range(OWN_BATCHES):
            self.model.embed_images(image_features=self.vision(self.pixels))
        self.own.append(BATCH * OWN_BATCHES / (monotonic() - ready))
        self.processor_seconds[1] += process_time() - processed
        self.paused += monotonic() - start
        self.since, self.processed_since = monotonic(), process_time()


def memory(kind: str) -> float:
    """Return this process's memory in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(kind))


def build(kind: str, photos: Path, folder: Path, cache: Path, every: int) -> dict[str, object]:
    """Build an index, or go on with one."""
    from visual_ground.indexing.build import BuildOptions, build_index

    torch.set_num_threads(1)
    model = Watched(grounded_model(cache, small=kind == "kills"), every)
    start = monotonic()
    options = BuildOptions(BATCH, WORKERS, thumbnail_size=128, part_size=PART, progress=False)
    report = build_index(model, photos, folder, options)
    seconds, quarter = monotonic() - start - model.paused, len(model.anonymous) // 4
    result = {
        "images": report.num_images,
        "encoder": "one layer, random" if kind == "kills" else "EfficientNet-lite0, 224 x 224, one thread",
        "processes_that_decode": WORKERS,
        "images_per_second_of_the_build": round(report.num_images / seconds, 1),
        "anonymous_memory_mb_in_the_second_and_last_quarter": [
            round(median(model.anonymous[quarter : 2 * quarter] or [0])),
            round(median(model.anonymous[-quarter:] or [0])),
        ],
        "anonymous_memory_mb_at_most": round(max(model.anonymous, default=0)),
        "anonymous_memory_mb_when_finished": round(memory("RssAnon")),
    }
    return {**result, **(rates(model) if every else {})}


def rates(model: Watched) -> dict[str, object]:
    """Return the build's rate at each turn against that of the encoder alone."""
    ratios = [built / own for built, own in zip(model.built, model.own, strict=True)]
    ratios = ratios[1:]  # The first turn holds the start of the processes.
    measured = BATCH * OWN_BATCHES * len(model.own), BATCH * model.every * len(model.built)
    in_build, alone = (s / n for s, n in zip(model.processor_seconds, measured[::-1], strict=True))
    return {
        "images_per_second_of_the_encoder_alone": round(median(model.own), 1),
        "build_against_encoder_alone": round(median(ratios), 3),
        "build_against_encoder_alone_at_each_turn": [round(one, 2) for one in ratios],
        "processor_time_of_the_building_process_against_encoder_alone": round(in_build / alone, 3),
    }


def kill_and_continue(command: list[str], folder: Path, images: int) -> int:
    """Start a build again and again, each time until it is killed; return how often."""
    from visual_ground.indexing.parts import PARTS_FOLDER

    marks = [lambda done, part=part: done >= part * images for part in KILLED_AT]
    marks.append(lambda done: bool(list(folder.glob(".staged-*/*"))))
    for number, reached in enumerate(marks):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while not reached(PART * len(list(folder.glob(f"{PARTS_FOLDER}/*.done.json")))):
            assert process.poll() is None, "it ended before it could be killed"
            sleep(0.002)
        sleep(0.7 * number if number < len(KILLED_AT) else 0)  # At another point within a part each time.
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return len(marks)


def contents(folder: Path) -> dict[str, str]:
    """Return a checksum of each file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def measure(kind: str, images: int, turns: int, scratch: Path) -> dict[str, object]:
    """Make the pictures and build."""
    photos, cache, killed = scratch / "photos", scratch / "cache", scratch / "killed"
    make_pictures(photos, images)
    own = [sys.executable, "-m", "benchmarks.index.build", kind, "--step", str(photos)]
    every = max(1, images // BATCH // turns) if kind == "rate" else 0
    done = subprocess.run([*own, str(scratch / "whole"), str(cache), str(every)], check=True, stdout=subprocess.PIPE)
    result = json.loads(done.stdout)
    result["mean_bytes_of_a_file"] = round(sum(path.stat().st_size for path in photos.iterdir()) / images)
    if kind == "kills":
        result["killed"] = kill_and_continue([*own, str(killed), str(cache), "0"], killed, images)
        result["identical_after_that"] = contents(killed) == contents(scratch / "whole")
    return {**result, "processors": os.cpu_count(), "load_average": round(os.getloadavg()[2], 1)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("rate", "kills"))
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--turns", type=int, default=16, help="how often the encoder is measured alone")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--step", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        *paths, every = options.step
        print(json.dumps(build(options.kind, *map(Path, paths), int(every))))
    else:
        with tempfile.TemporaryDirectory() as name:
            text = json.dumps(measure(options.kind, options.images, options.turns, Path(name)), indent=2)
        print(text)
        if options.output:
            options.output.write_text(text + "\n")
