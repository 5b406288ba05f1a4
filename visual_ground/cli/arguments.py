"""Arguments that several commands have, and what is loaded by them."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from visual_ground.model import GroundedModel
    from visual_ground.training.data.columns import Columns

    # argparse gives the object that parsers of commands are added to no public type.
    Commands: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the positional arguments that `load_model` reads."""
    parser.add_argument("lm", help="Hub id or folder of the LM")
    parser.add_argument("adapter", help="Hub id or folder of the adapter")


def load_model(options: argparse.Namespace) -> GroundedModel:
    """Return the grounded model that the arguments name."""
    from visual_ground import GroundedModel

    return GroundedModel.from_pretrained(options.lm, options.adapter)


def add_dataset_argument(parser: argparse.ArgumentParser) -> None:
    """Add the positional argument that names a dataset."""
    parser.add_argument("dataset", help="folder, file, pattern of files, or Hub id: see docs/training.md")


def add_column_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what of a dataset is read."""
    parser.add_argument("--split", metavar="NAME", default="train", help="part of the dataset; train")
    parser.add_argument("--image-column", metavar="NAME", help="else found by its name")
    parser.add_argument("--caption-column", metavar="NAME", help="else found by its name")
    parser.add_argument("--image-folder", metavar="DIR", help="where relative paths start; else beside the table")


def columns_of(options: argparse.Namespace, rows: Any) -> Columns:
    """Find a dataset's columns, and where its relative paths start."""
    from visual_ground.training.data.loading import column_names, find_columns, folder_of

    columns = find_columns(list(column_names(rows)), options.image_column, options.caption_column)
    return replace(columns, folder=options.image_folder or folder_of(options.dataset))
