"""`visual-ground eval`: measure a saved adapter on a dataset, or on one of the field's tasks."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from visual_ground.cli.shared.arguments import (
    add_column_options,
    add_max_skipped,
    add_model_arguments,
    check_places,
    columns_of,
    load_model,
    place,
    whole,
)
from visual_ground.errors import GroundingValueError

if TYPE_CHECKING:
    from visual_ground.cli.shared.arguments import Commands

WORK_DIR = "evaluations"


def add_parser(commands: Commands) -> argparse.ArgumentParser:
    """Add the command to the others, and return its parser."""
    parser = commands.add_parser("eval", help="measure an adapter on a dataset or one of the field's tasks, as JSON")
    add_model_arguments(parser)
    parser.add_argument(
        "dataset", help="a task, such as vist (docs/evaluation.md has them); or a folder, file, or Hub id of pairs"
    )
    parser.add_argument(
        "--record",
        metavar="DATASET",
        nargs="?",
        const="",
        help="write the results into the adapter's folder and card; for pairs, under this name",
    )
    parser.add_argument("--output", metavar="FILE", type=place, help="write them into this file too")
    task = parser.add_argument_group("for a task")
    task.add_argument("--data", metavar="DIR", help="folder with its official files")
    task.add_argument(
        "--set", metavar="NAME=VALUE", action="append", default=[], help="a setting, such as variant=published"
    )
    task.add_argument("--batch-size", type=whole(1), default=16, help="units measured at once; 16")
    task.add_argument("--seed", type=whole(0), default=0, help="of the bootstrap; 0")
    task.add_argument(
        "--work-dir", metavar="DIR", default=WORK_DIR, help=f"where a killed evaluation goes on from; {WORK_DIR}"
    )
    task.add_argument("--device", metavar="NAME", help="where the models run, such as cuda:1; a GPU if there is one")
    pairs = parser.add_argument_group("for pairs")
    pairs.add_argument("--dataset-revision", help="for --record: of the dataset")
    add_max_skipped(pairs)
    add_column_options(pairs)
    return parser


def run(options: argparse.Namespace) -> None:
    """Print what a saved adapter reaches, and write it into the adapter's folder if asked."""
    from visual_ground.evaluation.tasks.registry import TASKS

    check_places(file=options.output)
    if options.dataset in TASKS or options.data is not None:
        _run_task(options)
    else:
        _run_pairs(options)


def _run_task(options: argparse.Namespace) -> None:
    from visual_ground.evaluation.running.task import Evaluation
    from visual_ground.evaluation.tasks.registry import load_task
    from visual_ground.processes import Processes

    # Before the models are loaded, which takes long.
    task = load_task(options.dataset, options.data, **dict(map(_setting, options.set)))
    model = load_model(options)
    report = Evaluation(task, options.work_dir, options.batch_size, options.seed, progress=True).report(model)
    if not Processes.launched().is_main:
        return
    print(report.to_json())
    if options.output:
        report.save(options.output)
    if options.record is not None:
        report.record(model)
        model.save_pretrained(options.adapter)


def _setting(text: str) -> tuple[str, Any]:
    """Read NAME=VALUE; the value is JSON, or else a string."""
    name, found, value = text.partition("=")
    if not found or not name.isidentifier():
        raise GroundingValueError(f"--set takes NAME=VALUE, such as variant=published, got {text!r}.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _run_pairs(options: argparse.Namespace) -> None:
    from visual_ground.evaluation import CaptionPairEvaluator, EvaluationPairs, RetrievalEvaluator
    from visual_ground.storage.atomic import replacing
    from visual_ground.training.data.columns import forbidden_words, open_rows
    from visual_ground.training.data.loading import load_rows
    from visual_ground.training.data.preparing import Preparing

    if options.record == "":
        raise GroundingValueError("--record needs the dataset's name or Hub id here: --record me/pairs.")
    rows = load_rows(options.dataset, options.split)
    columns = columns_of(options, rows)
    open_rows(rows, columns)  # What is wrong with the dataset is said before the models are loaded.
    model = load_model(options)
    columns = replace(columns, forbidden=forbidden_words(model))
    preparing = Preparing(columns, None, model.vision.feature_dim, options.max_skipped, progress=True)
    pairs = EvaluationPairs(preparing.examples(rows, sample=False))
    results = {**RetrievalEvaluator(pairs)(model), **CaptionPairEvaluator(pairs)(model)}
    text = json.dumps({"pairs": len(pairs), **results}, indent=2)
    print(text)
    if options.output:
        with replacing(options.output) as path:
            path.write_text(text + "\n")
    if options.record:
        where = {"revision": options.dataset_revision, "split": options.split}
        model.active.report = model.active.report.measured(options.record, results, len(pairs), **where)
        model.save_pretrained(options.adapter)
