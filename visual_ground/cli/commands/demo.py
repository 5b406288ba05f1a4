"""`visual-ground demo`: the main job on real weights and images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from visual_ground.cli.shared.arguments import Commands

DESCRIPTION = "The main job on real weights and images: fit, evaluate, converse, save, load again."


def add_parser(commands: Commands) -> argparse.ArgumentParser:
    """Add the command to the others, and return its parser."""
    parser = commands.add_parser("demo", help="fit and try an adapter on emoji, end to end", description=DESCRIPTION)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the page and the results")
    parser.add_argument("--cache", type=Path, default=Path("demo/cache"), help="folder for weights and features")
    parser.add_argument("--short", action="store_true", help="few concepts: only to see that it runs")
    parser.add_argument("--choose", action="store_true", help="report on the validation concepts")
    return parser


def run(options: argparse.Namespace) -> int:
    """Run the demo; return 0, or 1 if the adapter that was loaded again gives other answers than the saved one."""
    from visual_ground.demo.run import run_demo

    return run_demo(options.out, options.cache, options.short, options.choose)
