"""`visual-ground index`: embed images so that they can be found."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from visual_ground.cli.arguments import add_model_arguments, load_model

if TYPE_CHECKING:
    from visual_ground.cli.arguments import Commands


def add_parser(commands: Commands) -> None:
    """Add the command to a parser."""
    parser = commands.add_parser("index", help="embed images so that they can be found")
    add_model_arguments(parser)
    parser.add_argument("images", nargs="+", help="image files, or folders of them")
    parser.add_argument("--output", required=True, help="folder for the index")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Embed image files, and those in folders, into an index."""
    from visual_ground import ImageIndex
    from visual_ground.prompts.types import IMAGE_SUFFIXES

    files: list[str] = []
    for name in options.images:
        inside = sorted(str(p) for p in Path(name).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        files += inside if os.path.isdir(name) else [name]
    ImageIndex.build(load_model(options), files, ids=files).save_pretrained(options.output)
