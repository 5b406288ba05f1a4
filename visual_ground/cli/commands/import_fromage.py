"""`visual-ground import-fromage`: turn an official FROMAGe checkpoint into an adapter."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from visual_ground.cli.shared.arguments import check_places, place

if TYPE_CHECKING:
    from visual_ground.cli.shared.arguments import Commands


def add_parser(commands: Commands) -> argparse.ArgumentParser:
    """Add the command to the others, and return its parser."""
    parser = commands.add_parser("import-fromage", help="turn an official FROMAGe checkpoint into an adapter")
    parser.add_argument("folder", help="holds model_args.json, the checkpoint and cc3m_embeddings*.pkl, if any")
    parser.add_argument(
        "--output", type=place, required=True, help="folder for the adapter; an index goes into its index/"
    )
    parser.add_argument("--checkpoint", help="where it is not pretrained_ckpt.pth.tar in the folder")
    return parser


def run(options: argparse.Namespace) -> None:
    """Turn an official checkpoint into an adapter, and its image embeddings into an index; no model is loaded."""
    from visual_ground.importers.fromage.convert import read_official, read_official_index

    check_places(folder=options.output)
    official, index = read_official(options.folder, options.checkpoint), read_official_index(options.folder)
    official.save(options.output)
    if index is not None:
        index.save_pretrained(Path(options.output) / "index")
    num_images = 0 if index is None else len(index)
    print(f"adapter of {official.lm} with {official.vision}; {num_images} images in its index")
