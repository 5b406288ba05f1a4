"""The command line: each command a thin layer over the Python API."""

from visual_ground.cli.main import main

__all__ = ["main"]
