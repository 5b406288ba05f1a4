"""`visual-ground`: the Python API from a terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from visual_ground.cli import chat, demo, import_fromage, index, push, serve, train, transfer
from visual_ground.cli import eval as evaluate
from visual_ground.errors import GroundingError

# A new command is a module with `add_parser` and `run`; its heavy imports stay inside `run`, so that --help is quick.
COMMANDS = (train, transfer, index, chat, serve, evaluate, push, import_fromage, demo)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code, or 2 after an error message where the input cannot be used."""
    parser = argparse.ArgumentParser(prog="visual-ground", description="Give any language model eyes.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('visual-ground')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    options = parser.parse_args(argv)
    try:
        return int(options.run(options) or 0)
    except GroundingError as error:
        print(f"visual-ground: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
