"""`visual-ground`: the Python API from a terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from visual_ground.cli import commands as run
from visual_ground.errors import GroundingError

TRAIN = "Train an adapter. A run that was stopped goes on when the same command is given again."


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0, or 2 where the input cannot be used, which is said on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["demo"]:
        from visual_ground.demo.run import main as demo

        return demo(arguments[1:])
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except GroundingError as error:
        print(f"visual-ground: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="visual-ground", description="Give any language model eyes.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train, transfer = _add_train(commands), _add_transfer(commands)
    index = commands.add_parser("index", help="embed images so that they can be found")
    chat = commands.add_parser("chat", help="talk; paths to images in a line are shown to the model")
    evaluate = commands.add_parser("eval", help="recall both ways and caption pair accuracy, as JSON")
    _add_push(commands)
    _add_import(commands)
    for command in (index, chat, evaluate):
        command.add_argument("lm", help="Hub id or folder of the LM")
        command.add_argument("adapter", help="Hub id or folder of the adapter")
    index.add_argument("images", nargs="+", help="image files, or folders of them")
    index.add_argument("--output", required=True, help="folder for the index")
    chat.add_argument("--index", help="folder of an index")
    chat.add_argument("--once", metavar="PROMPT", help="answer one prompt and stop")
    chat.add_argument("--html", help="write the last answer as a page")
    chat.add_argument("--max-new-tokens", type=int, default=64)
    chat.add_argument("--ret-bias", type=float, default=0.0, help="added to the logit of [RET]")
    chat.add_argument("--images", action="append", default=[], help="folder that the index's paths may lead into")
    chat.add_argument("--host", action="append", default=[], help="host that the index's images may be fetched from")
    evaluate.add_argument("--record", metavar="DATASET", help="write the results into the adapter's folder and card")
    evaluate.add_argument("--dataset-revision", help="for --record: of the dataset")
    for command in (train, evaluate):
        command.add_argument("dataset", help="folder, file, pattern of files, or Hub id: see docs/training.md")
    for command in (train, evaluate, transfer):
        command.add_argument("--split", metavar="NAME", default="train", help="part of the dataset; train")
        command.add_argument("--image-column", metavar="NAME", help="else found by its name")
        command.add_argument("--caption-column", metavar="NAME", help="else found by its name")
        command.add_argument("--image-folder", metavar="DIR", help="where relative paths start; else beside the table")
    for command, function in ((index, run.index), (chat, run.chat), (evaluate, run.evaluate)):
        command.set_defaults(run=function)
    return parser


def _add_train(commands: Any) -> argparse.ArgumentParser:
    train = commands.add_parser("train", help="train an adapter on image-caption pairs", description=TRAIN)
    train.add_argument("lm", help="Hub id or folder of a causal LM")
    train.add_argument("vision", help='Hub id or folder of an encoder, "open_clip:..." or "timm:..."')
    train.add_argument("--output", metavar="DIR", default="grounded", help="folder for all that is written")
    train.add_argument("--validation", metavar="DATASET", help="pairs to evaluate on at every checkpoint")
    train.add_argument("--steps", metavar="N", type=int, default=2000, help="2000 where not given")
    train.add_argument("--batch-size", metavar="N", type=int, help="pairs per step and process; 64, or all there are")
    train.add_argument("--learning-rate", metavar="X", type=float, default=1e-3, help="0.001 where not given")
    train.add_argument("--visual-tokens", metavar="N", type=int, default=1, help="input rows per image; 1")
    train.add_argument("--save-steps", metavar="N", type=int, default=200, help="steps between checkpoints; 200")
    train.add_argument("--workers", metavar="N", type=int, default=0, help="processes that read and decode; none")
    train.add_argument("--streaming", action="store_true", help="read row by row, without a copy on the disk")
    train.add_argument("--no-cache", action="store_true", help="run the encoder in every step, keep no features")
    train.add_argument("--max-skipped", metavar="X", type=float, default=0.01, help="part that may be unreadable; 0.01")
    train.add_argument("--bf16", action="store_true", help="load the LM in bfloat16")
    train.add_argument("--seed", metavar="N", type=int, default=0, help="of start values and order; 0")
    train.set_defaults(run=run.train)
    return train


def _add_transfer(commands: Any) -> argparse.ArgumentParser:
    transfer = commands.add_parser("transfer", help="move an adapter to another LM; its image indexes stay valid")
    transfer.add_argument("adapter", help="Hub id or folder of the adapter")
    transfer.add_argument("lm", help="Hub id or folder of the LM that it moves to")
    transfer.add_argument("--output", required=True, help="folder for the new adapter")
    transfer.add_argument("--dataset", help="image-caption pairs to fit with, instead of the adapter's anchors")
    transfer.add_argument("--vision", help="the encoder, where the adapter names none")
    transfer.set_defaults(run=run.transfer)
    return transfer


def _add_push(commands: Any) -> None:
    push = commands.add_parser("push", help="upload a saved adapter or index to the Hub, as one commit")
    push.add_argument("folder", help="folder of the adapter or index")
    push.add_argument("repository", help="Hub id of the repository, made where it does not exist")
    push.add_argument("--private", action="store_true", default=None, help="a new repository is private")
    push.add_argument("--revision", help="branch, made where it does not exist")
    push.add_argument("--message", help="first line of the commit")
    push.add_argument("--create-pr", action="store_true", help="open a pull request")
    push.add_argument("--copy-images", action="store_true", help="publish an index's local image files too")
    push.set_defaults(run=run.push)


def _add_import(commands: Any) -> None:
    official = commands.add_parser("import-fromage", help="turn an official FROMAGe checkpoint into an adapter")
    official.add_argument("folder", help="holds model_args.json, the checkpoint and cc3m_embeddings*.pkl, if any")
    official.add_argument("--output", required=True, help="folder for the adapter; an index goes into its index/")
    official.add_argument("--checkpoint", help="where it is not pretrained_ckpt.pth.tar in the folder")
    official.set_defaults(run=run.import_official)


if __name__ == "__main__":
    raise SystemExit(main())
