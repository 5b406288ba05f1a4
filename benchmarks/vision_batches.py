"""How many images a CPU should run at once: seconds for 64 images of five kinds of encoders, with random weights.

    python benchmarks/vision_batches.py

`VisionEncoder` runs `CPU_IMAGES` at once on a CPU. Images are 224 x 224, in float32.
"""

from __future__ import annotations

import time

import timm
import torch
from measure import write

ENCODERS = ("efficientnet_lite0", "vit_small_patch16_224", "vit_base_patch32_224", "resnet50", "convnext_tiny")
IMAGES, AT_ONCE, ROUNDS = 64, (64, 32, 16, 8, 4, 2, 1), 2


@torch.no_grad()
def main() -> None:
    """Measure, write."""
    found: dict[str, dict[str, float]] = {}
    for name in ENCODERS:
        model = timm.create_model(name, pretrained=False).eval()
        pixels = torch.randn(IMAGES, 3, 224, 224)
        model(pixels[:4])
        times: dict[str, float] = {}
        for _ in range(ROUNDS):
            for count in AT_ONCE:
                start = time.perf_counter()
                for part in pixels.split(count):
                    model(part)
                took = round(time.perf_counter() - start, 2)
                times[str(count)] = min(took, times.get(str(count), took))
        found[name] = times
        print(name, times, flush=True)
    write("vision_batches", {"images": IMAGES, "seconds_by_images_at_once": found})


if __name__ == "__main__":
    main()
