"""What the commands say on the standard error, and what they keep other packages from saying."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from visual_ground.errors import GroundingError

FAILED = 2
# Packages whose advice is for programmers; how each is told so before it is imported.
NOISY = (
    "transformers",
    "huggingface_hub",
    "datasets",
    "timm",
    "open_clip",
    "torch",
    "torch.utils._pytree",
    "accelerate",
    "bitsandbytes",
    "peft",
    "torchao",
)
VERBOSITY = {"TRANSFORMERS_VERBOSITY": "error", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "HF_HUB_VERBOSITY": "error"}


def one_line(error: BaseException) -> str:
    """Return an error's text on one line, with the kind of error if the text alone may say nothing."""
    text = " ".join(str(error).split())
    if isinstance(error, GroundingError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the warnings of other packages from the screen until the block ends; this package's own are shown.

    `python -W` and variables of the environment that ask for more are heeded.
    """
    asked = {name: value for name, value in VERBOSITY.items() if name not in os.environ}
    levels = {name: logging.getLogger(name).level for name in NOISY}
    os.environ.update(asked)
    for name in NOISY if not sys.warnoptions else ():
        logging.getLogger(name).setLevel(logging.ERROR)
        logging.getLogger(name).addFilter(_is_error)  # When it is imported, torch sets the levels of its loggers anew.
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            yield
    finally:
        for name in asked:
            os.environ.pop(name, None)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
            logging.getLogger(name).removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
