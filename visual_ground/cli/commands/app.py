"""`visual-ground app`: a page to talk to, in a browser."""

from __future__ import annotations

import argparse
import threading
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visual_ground.cli.shared.arguments import (
    add_address,
    add_max_images,
    add_vision_option,
    check_address,
    load_model,
    open_index,
    whole,
)
from visual_ground.errors import GroundingStateError, GroundingValueError

if TYPE_CHECKING:
    from visual_ground.app.page import PageSettings
    from visual_ground.cli.shared.arguments import Commands
    from visual_ground.model import GroundedModel
    from visual_ground.server.pictures import ShownIndex

DESCRIPTION = "A page to talk to. Without LM and ADAPTER, it has what `make demo` made."


def add_parser(commands: Commands) -> argparse.ArgumentParser:
    """Add the command to the others, and return its parser."""
    parser = commands.add_parser("app", help="open a page to talk to in a browser", description=DESCRIPTION)
    parser.add_argument("lm", nargs="?", help="Hub id or folder of the LM")
    parser.add_argument("adapter", nargs="?", help="Hub id or folder of the adapter")
    add_vision_option(parser)
    parser.add_argument(
        "--another-adapter", metavar="NAME=DIR", action="append", default=[], help="one more to choose from"
    )
    parser.add_argument(
        "--index",
        metavar="NAME=INDEX",
        action="append",
        default=[],
        help="folder, Hub id, or images.db or http://HOST:19530#NAME in Milvus; NAME= may be left out",
    )
    parser.add_argument(
        "--images", metavar="DIR", action="append", default=[], help="folder that the indexes' paths may lead into"
    )
    parser.add_argument(
        "--host", metavar="NAME", action="append", default=[], help="host that their images may be fetched from"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message; everyone can change it on the page")
    parser.add_argument("--example", metavar="TEXT", action="append", default=[], help="a question to begin with")
    parser.add_argument("--title", default="visual_ground", help="the page's heading")
    parser.add_argument("--demo", metavar="DIR", type=Path, default=Path("demo"), help="where `make demo` wrote; demo")
    add_address(parser, 7860)
    add_max_images(parser)
    parser.add_argument("--max-batch", type=whole(1), default=8, help="answers that are generated together")
    parser.add_argument("--max-waiting", type=whole(1), default=64, help="questions that may wait; more are refused")
    parser.add_argument("--open", action="store_true", help="open the page in this machine's browser")
    return parser


def run(options: argparse.Namespace) -> None:
    """Show the page until interrupted."""
    try:
        import gradio  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise GroundingStateError(f'{error}. The page needs an extra: pip install "visual-ground[app]".') from error
    check_address(options.address, options.port)
    from visual_ground.app.web import create_page
    from visual_ground.server.engine import EngineLimits

    model, indexes, settings = load(options)
    page = create_page(model, indexes, settings, EngineLimits(options.max_batch, options.max_waiting))
    address = f"http://{options.address}:{options.port}"
    print(f"The page is at {address}; Ctrl-C ends it.", flush=True)
    if options.open:
        threading.Timer(1.0, webbrowser.open, [address]).start()
    uvicorn.run(page, host=options.address, port=options.port, log_level="warning", access_log=False)


def load(options: argparse.Namespace) -> tuple[GroundedModel, dict[str, ShownIndex], PageSettings]:
    """Return what the options name, or what the demo made.

    Raises:
        GroundingValueError: an LM without an adapter.
        GroundingStateError: neither, and the demo has not run.
    """
    from visual_ground.app.page import PageSettings

    given: dict[str, Any] = {"title": options.title, "system": options.system}
    given |= {"examples": tuple(options.example) or None, "max_images": options.max_images}
    given = {name: value for name, value in given.items() if value is not None}
    indexes = {name: open_index(place, options) for name, place in map(_named, options.index)}
    if options.lm is None:
        from visual_ground.demo.saved import load_demo
        from visual_ground.prompts.chat import ILLUSTRATED

        model, index = load_demo(options.demo, options.demo / "cache")
        indexes = {"OpenMoji": index, **indexes}
        # As in the demo's own conversations.
        usual = {"system": ILLUSTRATED, "max_tokens": 48, "max_images": 1, "only_after_sentences": True}
        settings = PageSettings(**{**usual, **given})
    elif options.adapter is None:
        raise GroundingValueError(f"{options.lm} needs an adapter: visual-ground app LM ADAPTER.")
    else:
        model, settings = load_model(options), PageSettings(**{"examples": (), **given})
    for name, folder in map(_named, options.another_adapter):
        model.load_adapter(folder, name)
    return model, indexes, settings


def _named(given: str) -> tuple[str, str]:
    """Return the name and the folder of `NAME=DIR`; the folder's own name if there is none."""
    name, equals, folder = given.partition("=")
    return (name, folder) if equals and name and folder else (Path(given).name or given, given)
