"""`visual-ground transfer`: move an adapter to another language model."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from visual_ground.cli.shared.arguments import add_column_options, add_vision_option, check_places, columns_of, place

if TYPE_CHECKING:
    from visual_ground.cli.shared.arguments import Commands


def add_parser(commands: Commands) -> argparse.ArgumentParser:
    """Add the command to the others, and return its parser."""
    parser = commands.add_parser("transfer", help="move an adapter to another LM; its image indexes stay valid")
    parser.add_argument("adapter", help="Hub id or folder of the adapter")
    parser.add_argument("lm", help="Hub id or folder of the LM that it moves to")
    parser.add_argument("--output", type=place, required=True, help="folder for the new adapter")
    parser.add_argument("--dataset", help="image-caption pairs to fit with, instead of the adapter's anchors")
    add_vision_option(parser)
    add_column_options(parser)
    return parser


def run(options: argparse.Namespace) -> None:
    """Move an adapter to another LM; the one that it was trained with is not loaded."""
    from visual_ground.components import load_encoder
    from visual_ground.training.data.loading import load_rows
    from visual_ground.transferring.collect import collect_anchors
    from visual_ground.transferring.image_side import ImageSide
    from visual_ground.transferring.transfer import transfer

    check_places(folder=options.output)
    side, anchors = ImageSide.load(options.adapter), None
    if options.dataset is not None:
        encoder = load_encoder(options.vision, None, side.config, side.provenance)[0]
        rows = load_rows(options.dataset, options.split)
        side, anchors = replace(side, vision=encoder), collect_anchors(rows, encoder, columns_of(options, rows))
    vision = options.vision and (side.vision or options.vision)
    transfer(side, options.lm, anchors=anchors, vision_encoder=vision).save_pretrained(options.output)
