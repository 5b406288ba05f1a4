"""`visual-ground`: the Python API from a terminal."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

from visual_ground.cli.commands import app, chat, demo, fit, import_fromage, index, push, serve, train, transfer
from visual_ground.cli.commands import eval as evaluate
from visual_ground.cli.shared.messages import FAILED, one_line, quiet

# A new command is a module of `commands/` with two functions: `add_parser` returns its parser, and `run` does what the
# parsed options say. Its heavy imports stay inside `run`, so that --help is quick.
COMMANDS = (fit, train, transfer, index, chat, serve, app, evaluate, push, import_fromage, demo)
INTERRUPTED = 130  # The exit code of shells for Ctrl-C.
# Set to see where an error comes from, instead of its one line.
TRACEBACK = "VISUAL_GROUND_TRACEBACK"
NEGATIVE = re.compile(r"-(\d|\.\d|inf)", re.IGNORECASE)


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with arguments, as commands do with all else."""

    def error(self, message: str) -> NoReturn:
        """End the program."""
        self.exit(FAILED, f"{self.prog}: {' '.join(message.split())}; {self.prog} --help says what it takes.\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code.

    What cannot be done is one line on the standard error, and 2; Ctrl-C is 130.
    """
    parser = Parser(prog="visual-ground", description="Give any language model eyes.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('visual-ground')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands).set_defaults(run=command.run)
    options = parser.parse_args(_joined(sys.argv[1:] if argv is None else argv))
    try:
        with quiet():
            code = int(options.run(options) or 0)
            sys.stdout.flush()  # Here, where a reader that has gone is no error.
            return code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # Whoever read the output has gone, such as `head`; nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    # Other packages have errors of every kind, and a user of the command line has no use for their tracebacks.
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        print(f"visual-ground: {one_line(error)}", file=sys.stderr)
        return FAILED


def _joined(arguments: Sequence[str]) -> list[str]:
    """Write `--option -1e3` as `--option=-1e3`, which argparse would take for an option that it does not know."""
    joined: list[str] = []
    for argument in arguments:
        if NEGATIVE.match(argument) and joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


if __name__ == "__main__":
    raise SystemExit(main())
