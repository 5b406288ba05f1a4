"""`visual-ground fit`: a whole adapter in minutes, without a training run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from visual_ground.cli.arguments import (
    add_column_options,
    add_dataset_argument,
    add_lm_options,
    ground_models,
    number,
    pair_settings,
)

if TYPE_CHECKING:
    from visual_ground.cli.arguments import Commands

PREFIX_CACHE_GB = 1.0  # The LM runs each caption once if this holds what is kept of all, a few dozen KB each.


def add_parser(commands: Commands) -> None:
    """Add the command to a parser."""
    parser = commands.add_parser("fit", help="fit an adapter to image-caption pairs in minutes")
    add_lm_options(parser)
    add_dataset_argument(parser)
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for the adapter")
    parser.add_argument(
        "--max-skipped", metavar="X", type=number(0, 1), default=0.01, help="part that may be unreadable; 0.01"
    )
    add_column_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Fit an adapter and save it."""
    from visual_ground import GroundingTrainingArguments, fit
    from visual_ground.training.data.loading import load_rows

    rows = load_rows(options.dataset, options.split)
    settings = pair_settings(options, rows)
    arguments = GroundingTrainingArguments(output_dir=options.output, prefix_cache_gb=PREFIX_CACHE_GB, **settings)
    model = ground_models(options)
    fit(model, rows, arguments)
    model.save_pretrained(options.output)
