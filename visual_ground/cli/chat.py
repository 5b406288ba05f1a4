"""`visual-ground chat`: talk with a grounded model."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from visual_ground.cli.arguments import (
    add_answer_options,
    add_index_options,
    add_model_arguments,
    answer_options,
    load_index,
    load_model,
)
from visual_ground.errors import GroundingError

if TYPE_CHECKING:
    from visual_ground.cli.arguments import Commands
    from visual_ground.generation.output import Part
    from visual_ground.terminal.conversation import Conversation

HELP = """\
Write a line and press Enter. Paths of images in it are shown to the model; put quotes around those with spaces.
/image PATH  show an image with your next line
/reset       forget the conversation
/save FILE   write the conversation as .html, .md or .json
/help        this
Ctrl-C stops an answer; Ctrl-D, or Ctrl-C while you write, ends."""


def add_parser(commands: Commands) -> None:
    """Add the command to a parser."""
    parser = commands.add_parser("chat", help="talk; paths to images in a line are shown to the model")
    add_model_arguments(parser)
    add_index_options(parser)
    parser.add_argument("--once", metavar="PROMPT", help="answer one prompt and stop")
    parser.add_argument("--html", help="write the last answer as a page")
    add_answer_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Answer line by line until the input ends, or once; return the exit code."""
    from visual_ground.errors import GroundingFileError
    from visual_ground.terminal.conversation import Conversation

    if options.html and os.path.isdir(options.html):  # Loading and answering take long: what is wrong is said before.
        raise GroundingFileError(f"--html takes the path of a page, and {options.html!r} is a folder.")
    conversation = Conversation(load_model(options), load_index(options), answer_options(options))
    if options.once:
        answer(conversation, options.once, options.html)
        return 0
    return converse(conversation, options.html)


def converse(conversation: Conversation, page: str | None) -> int:
    """Answer the lines of the standard input; a line that cannot be answered is reported and forgotten."""
    is_person = sys.stdin.isatty()
    code = 0
    if is_person:
        print("/help lists what you can do.", file=sys.stderr)
    while True:
        try:
            line = (input("> ") if is_person else input()).strip()
        except (EOFError, KeyboardInterrupt):
            if is_person:
                print(file=sys.stderr)
            return code
        try:
            if line.startswith("/") and (done := command(conversation, line)):
                print(done, file=sys.stderr)
            elif line:
                answer(conversation, line, page)
        except (GroundingError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            print(f"visual-ground: {error}", file=sys.stderr)
            code = 0 if is_person else 2


def command(conversation: Conversation, line: str) -> str | None:
    """Do what a line that begins with a slash says and return what to tell; None where it is a path or no command."""
    name, _, argument = line.partition(" ")
    argument = argument.strip().strip("\"'")
    if name == "/help":
        return HELP
    if name == "/reset":
        conversation.reset()
        return "The conversation is forgotten."
    if name == "/image":
        conversation.show(argument)
        return f"The model will see {argument} with your next line."
    if name == "/save":
        conversation.save(argument)
        return f"Saved to {argument}."
    return None if "/" in name[1:] or "." in name else f"{name} is no command; /help lists them."


def answer(conversation: Conversation, line: str, page: str | None) -> None:
    """Print an answer while it is said."""
    at_start = True
    try:
        for part in conversation.answer(line):
            print(shown(part, at_start), end="", flush=True)
            at_start = not isinstance(part, str) or part.endswith("\n")
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    if not at_start:
        print()
    if page and conversation.turns:
        conversation.turns[-1][1].save(page)


def shown(part: Part, at_start: bool) -> str:
    """Return a part of an answer as standard output shows it: a picture, drawn where that can be, above its line."""
    from visual_ground.terminal.inline import drawn, protocol_of

    if isinstance(part, str):
        return part.lstrip() if at_start else part
    protocol = protocol_of(sys.stdout, os.environ)
    picture = drawn(part.image, protocol) if protocol and part.is_readable else None
    score = "" if part.score is None else f" {part.score:.2f}"
    where = "" if part.uri is None else f" {part.uri}"
    return f"{'' if at_start else chr(10)}{f'{picture}{chr(10)}' if picture else ''}{part}{score}{where}\n"
