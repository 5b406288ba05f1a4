"""`visual-ground push`: upload a saved adapter or index to the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from visual_ground.cli.shared.arguments import Commands


def add_parser(commands: Commands) -> argparse.ArgumentParser:
    """Add the command to the others, and return its parser."""
    parser = commands.add_parser("push", help="upload a saved adapter or index to the Hub, as one commit")
    parser.add_argument("folder", help="folder of the adapter or index")
    parser.add_argument("repository", help="Hub id of the repository, made where it does not exist")
    parser.add_argument("--private", action="store_true", default=None, help="a new repository is private")
    parser.add_argument("--revision", help="branch, made where it does not exist")
    parser.add_argument("--message", help="first line of the commit")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request")
    parser.add_argument("--copy-images", action="store_true", help="publish an index's local image files too")
    return parser


def run(options: argparse.Namespace) -> None:
    """Push what the folder holds, and print the commit's address; no model is loaded."""
    from visual_ground import ImageIndex
    from visual_ground.adapter.files import push_saved
    from visual_ground.index.files import ENTRIES_FILE
    from visual_ground.index.remote_images import LinkRules
    from visual_ground.storage.hub import PushOptions

    where = PushOptions(options.private, options.revision, None, options.message, options.create_pr)
    if not Path(options.folder, ENTRIES_FILE).is_file():
        print(push_saved(options.folder, options.repository, where))
        return
    # The folder is the user's own, so the paths in it may lead anywhere on this machine.
    rules = LinkRules(folders=(Path(options.folder).absolute().anchor,)) if options.copy_images else None
    index = ImageIndex.from_pretrained(options.folder, rules)
    print(index.push_to_hub(options.repository, copy_images=options.copy_images, **vars(where)))
