"""`visual-ground train`: train an adapter on image-caption pairs."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from visual_ground.cli.shared.arguments import (
    add_column_options,
    add_dataset_argument,
    add_lm_options,
    add_max_skipped,
    check_places,
    ground_models,
    number,
    pair_settings,
    place,
    whole,
)

if TYPE_CHECKING:
    from visual_ground.cli.shared.arguments import Commands

DESCRIPTION = "Train an adapter. A run that was stopped goes on when the same command is given again."
# Retrieval learns to tell each pair from the others of its batch, so a batch must not be small.
BATCH_SIZE = 64
CHECKPOINTS_KEPT = 2  # One to continue from, and the one before it.


def add_parser(commands: Commands) -> argparse.ArgumentParser:
    """Add the command to the others, and return its parser."""
    parser = commands.add_parser("train", help="train an adapter on image-caption pairs", description=DESCRIPTION)
    add_lm_options(parser)
    add_dataset_argument(parser)
    parser.add_argument(
        "--output", metavar="DIR", type=place, default="grounded", help="folder for all that is written"
    )
    parser.add_argument("--validation", metavar="DATASET", help="pairs to evaluate on at every checkpoint")
    parser.add_argument("--steps", metavar="N", type=whole(1), default=2000, help="2000 where not given")
    parser.add_argument(
        "--batch-size", metavar="N", type=whole(1), help="pairs per step and process; 64, or all there are"
    )
    parser.add_argument("--learning-rate", metavar="X", type=number(0), default=1e-3, help="0.001 where not given")
    parser.add_argument("--save-steps", metavar="N", type=whole(1), default=200, help="steps between checkpoints; 200")
    parser.add_argument("--workers", metavar="N", type=whole(0), default=0, help="processes that read and decode; none")
    parser.add_argument("--streaming", action="store_true", help="read row by row, without a copy on the disk")
    parser.add_argument("--no-cache", action="store_true", help="run the encoder in every step, keep no features")
    add_max_skipped(parser)
    parser.add_argument("--seed", metavar="N", type=whole(0), default=0, help="of start values and order; 0")
    add_column_options(parser)
    return parser


def run(options: argparse.Namespace) -> None:
    """Train an adapter, or continue training it."""
    from transformers import set_seed

    from visual_ground import GroundingTrainer
    from visual_ground.training.data.loading import SHUFFLED, load_rows

    check_places(folder=options.output)
    rows = load_rows(options.dataset, options.split, options.streaming)
    arguments = _training_arguments(options, rows)
    validation = None if options.validation is None else load_rows(options.validation, options.split)
    rows = rows.shuffle(seed=options.seed, buffer_size=SHUFFLED) if options.streaming else rows
    # The adapter's start values must be the same when a killed run starts again.
    set_seed(options.seed)
    model = ground_models(options)
    trainer = GroundingTrainer(model, arguments, rows, validation)
    trainer.train(resume_from_checkpoint=True)
    if trainer.args.should_save:
        model.save_pretrained(options.output)


def _training_arguments(options: argparse.Namespace, rows: Any) -> Any:
    from visual_ground import GroundingTrainingArguments

    batch_size = BATCH_SIZE
    if not options.streaming:  # A small dataset is one batch, shared by the processes; contrast needs two pairs.
        batch_size = max(2, min(BATCH_SIZE, len(rows) // int(os.environ.get("WORLD_SIZE", 1))))
    return GroundingTrainingArguments(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size or batch_size,
        learning_rate=options.learning_rate,
        save_steps=options.save_steps,
        save_total_limit=CHECKPOINTS_KEPT,
        eval_strategy="no" if options.validation is None else "steps",
        eval_steps=options.save_steps,
        logging_steps=min(10, options.steps),
        dataloader_num_workers=options.workers,
        cache_features=not options.no_cache,
        seed=options.seed,
        **pair_settings(options, rows),
    )
