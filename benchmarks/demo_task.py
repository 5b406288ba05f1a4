"""Measure one of the evaluation tasks on an adapter for the demo's models, which are in no registry of models.

    make demo
    python -m benchmarks.demo_task emoji --adapter demo/adapter --cache demo/cache

Image features and records are kept in the cache, so that a measurement that is stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.transfer import common
from visual_ground import GroundedModel, evaluate
from visual_ground.demo.weights import load_vision


def main() -> None:
    """Print the report, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="emoji, easy-vqa, or another one with --data")
    parser.add_argument("--adapter", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--cache", type=Path, required=True, help="the demo's cache, with the language model")
    parser.add_argument("--lm", choices=["smollm2", "gemma3"], default="smollm2")
    parser.add_argument("--data", help="folder of the task's files, where it reads any")
    parser.add_argument("--settings", type=json.loads, default={}, help='of the task, such as {"images": 100}')
    parser.add_argument("--output", type=Path, help="file for the report")
    options = parser.parse_args()
    common.CACHE = options.cache
    lm, tokenizer = common.load_lm(options.lm)
    model = GroundedModel.from_pretrained(lm, options.adapter, load_vision(), tokenizer)
    report = evaluate(model, options.task, options.data, options.cache, **options.settings)
    print(report)
    if options.output:
        report.save(options.output)


if __name__ == "__main__":
    main()
