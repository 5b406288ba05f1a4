"""`visual-ground eval`: measure a saved adapter on a dataset."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from visual_ground.cli.arguments import (
    add_column_options,
    add_dataset_argument,
    add_model_arguments,
    columns_of,
    load_model,
)

if TYPE_CHECKING:
    from visual_ground.cli.arguments import Commands


def add_parser(commands: Commands) -> None:
    """Add the command to a parser."""
    parser = commands.add_parser("eval", help="recall both ways and caption pair accuracy, as JSON")
    add_model_arguments(parser)
    add_dataset_argument(parser)
    parser.add_argument("--record", metavar="DATASET", help="write the results into the adapter's folder and card")
    parser.add_argument("--dataset-revision", help="for --record: of the dataset")
    add_column_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print what a saved adapter reaches on a dataset, and write it into the adapter's folder where asked."""
    from visual_ground.evaluation import CaptionPairEvaluator, EvaluationPairs, RetrievalEvaluator
    from visual_ground.training.data.examples import ExampleDataset
    from visual_ground.training.data.loading import load_rows

    rows = load_rows(options.dataset, options.split)
    pairs = EvaluationPairs(ExampleDataset(rows, sample=False, columns=columns_of(options, rows)))
    model = load_model(options)
    results = {**RetrievalEvaluator(pairs)(model), **CaptionPairEvaluator(pairs)(model)}
    print(json.dumps({"pairs": len(pairs), **results}, indent=2))
    if options.record:
        where = {"revision": options.dataset_revision, "split": options.split}
        model.active.report = model.active.report.measured(options.record, results, len(pairs), **where)
        model.save_pretrained(options.adapter)
