"""The command line: one file a command, each a thin layer over the Python API."""

from visual_ground.cli.main import main

__all__ = ["main"]
