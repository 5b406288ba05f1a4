"""`visual-ground fit`: a whole adapter in minutes, without a training run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from visual_ground.cli.shared.arguments import (
    add_column_options,
    add_dataset_argument,
    add_lm_options,
    add_max_skipped,
    check_places,
    ground_models,
    pair_settings,
    place,
)

if TYPE_CHECKING:
    from visual_ground.cli.shared.arguments import Commands

PREFIX_CACHE_GB = 1.0  # The LM runs each caption once if this holds what is kept of all, a few dozen KB each.


def add_parser(commands: Commands) -> argparse.ArgumentParser:
    """Add the command to the others, and return its parser."""
    parser = commands.add_parser("fit", help="fit an adapter to image-caption pairs in minutes")
    add_lm_options(parser)
    add_dataset_argument(parser)
    parser.add_argument("--output", metavar="DIR", type=place, required=True, help="folder for the adapter")
    add_max_skipped(parser)
    add_column_options(parser)
    return parser


def run(options: argparse.Namespace) -> None:
    """Fit an adapter and save it."""
    from visual_ground import GroundingTrainingArguments, fit
    from visual_ground.training.data.loading import load_rows

    check_places(folder=options.output)
    rows = load_rows(options.dataset, options.split)
    settings = pair_settings(options, rows)
    arguments = GroundingTrainingArguments(output_dir=options.output, prefix_cache_gb=PREFIX_CACHE_GB, **settings)
    model = ground_models(options)
    fit(model, rows, arguments)
    model.save_pretrained(options.output)
