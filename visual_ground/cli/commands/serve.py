"""`visual-ground serve`: an HTTP server that OpenAI's clients can talk to."""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from visual_ground.cli.shared.arguments import (
    add_address,
    add_index_options,
    add_max_images,
    add_model_arguments,
    check_address,
    load_index,
    load_model,
    number,
    whole,
)
from visual_ground.errors import GroundingStateError

if TYPE_CHECKING:
    from visual_ground.cli.shared.arguments import Commands

KEY = "VISUAL_GROUND_API_KEY"


def add_parser(commands: Commands) -> argparse.ArgumentParser:
    """Add the command to the others, and return its parser."""
    parser = commands.add_parser("serve", help="answer over HTTP, as OpenAI's API does")
    add_model_arguments(parser)
    add_index_options(parser)
    add_address(parser, 8000)
    parser.add_argument("--name", default="visual-ground", help="what clients call the model")
    parser.add_argument("--origin", action="append", default=[], help="web page that may call the server")
    add_max_images(parser)
    parser.add_argument(
        "--max-batch", metavar="N", type=whole(1), default=8, help="answers that are generated together"
    )
    parser.add_argument(
        "--max-waiting", metavar="N", type=whole(1), default=64, help="answers that may wait; more are refused"
    )
    parser.add_argument("--timeout", metavar="X", type=number(0), default=300.0, help="seconds for one answer")
    parser.description = f"Clients must send the API key that the environment variable {KEY} holds, if it is set."
    return parser


def run(options: argparse.Namespace) -> None:
    """Serve until interrupted."""
    try:
        import uvicorn
    except ImportError as error:
        raise GroundingStateError(f'{error}. The server needs an extra: pip install "visual-ground[serve]".') from error
    check_address(options.address, options.port)
    from visual_ground.index.remote_images import LinkRules
    from visual_ground.server.engine import EngineLimits
    from visual_ground.server.http import ServerSettings, create_app

    limits = EngineLimits(options.max_batch, options.max_waiting, timeout=options.timeout)
    settings = ServerSettings(
        options.name, os.environ.get(KEY) or None, LinkRules(options.host), origins=options.origin, limits=limits
    )
    if options.max_images is not None:
        settings = replace(settings, max_images=options.max_images)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    app = create_app(load_model(options), load_index(options), settings)
    uvicorn.run(app, host=options.address, port=options.port, log_level="warning", access_log=False)
