"""`visual-ground transfer`: move an adapter to another language model."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from visual_ground.cli.arguments import add_column_options, columns_of

if TYPE_CHECKING:
    from visual_ground.cli.arguments import Commands


def add_parser(commands: Commands) -> None:
    """Add the command to a parser."""
    parser = commands.add_parser("transfer", help="move an adapter to another LM; its image indexes stay valid")
    parser.add_argument("adapter", help="Hub id or folder of the adapter")
    parser.add_argument("lm", help="Hub id or folder of the LM that it moves to")
    parser.add_argument("--output", required=True, help="folder for the new adapter")
    parser.add_argument("--dataset", help="image-caption pairs to fit with, instead of the adapter's anchors")
    parser.add_argument("--vision", help="the encoder, where the adapter names none")
    parser.add_argument("--steps", type=int, default=0, help="training steps after the closed form; 0")
    add_column_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Move an adapter to another LM; the one that it was trained with is not loaded."""
    from visual_ground.adapter.anchors import Anchors
    from visual_ground.errors import GroundingValueError
    from visual_ground.training.data.loading import load_rows
    from visual_ground.transfer.transfer import ImageSide, Refinement, transfer
    from visual_ground.vision.loading import load_vision

    source = ImageSide.load(options.adapter)
    name = options.vision or source.vision
    if name is None:
        raise GroundingValueError("This adapter names no vision encoder. Pass --vision.")
    vision, anchors = load_vision(name), None
    if options.dataset is not None:
        rows = load_rows(options.dataset, options.split)
        anchors = Anchors.from_rows(rows, vision, columns_of(options, rows))
    source = replace(source, vision=vision)
    refinement = Refinement(options.steps) if options.steps else None
    model = transfer(source, options.lm, anchors=anchors, refinement=refinement)
    model.save_pretrained(options.output)
