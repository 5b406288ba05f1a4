"""`visual-ground chat`: talk with a grounded model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from visual_ground.cli.arguments import (
    add_answer_options,
    add_index_options,
    add_model_arguments,
    answer_options,
    load_index,
    load_model,
)

if TYPE_CHECKING:
    from visual_ground.cli.arguments import Commands


def add_parser(commands: Commands) -> None:
    """Add the command to a parser."""
    parser = commands.add_parser("chat", help="talk; paths to images in a line are shown to the model")
    add_model_arguments(parser)
    add_index_options(parser)
    parser.add_argument("--once", metavar="PROMPT", help="answer one prompt and stop")
    parser.add_argument("--html", help="write the last answer as a page")
    add_answer_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Answer line by line until an empty one, or once."""
    from visual_ground.prompts.chat import chat_message

    model = load_model(options)
    index = load_index(options)
    messages: list[dict[str, Any]] = []
    while line := options.once or input("> "):
        parts = split_line(line)
        messages.append(chat_message("user", parts))
        # An LM without a chat template answers each line by itself.
        prompt: Any = messages if model.tokenizer.chat_template else [parts]
        answer = model.generate(prompt, index, **answer_options(options))[0]
        messages.append(chat_message("assistant", [answer.text]))
        print(answer)
        if options.html:
            answer.save(options.html)
        if options.once:
            return


def split_line(line: str) -> list[str]:
    """Cut a line into texts and the paths of the images in it."""
    from visual_ground.prompts.types import is_image_file

    parts = [""]
    for word in line.split():
        if is_image_file(word):
            parts += [word, ""]
        else:
            parts[-1] = f"{parts[-1]} {word}".strip()
    return [part for part in parts if part]
