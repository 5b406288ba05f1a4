"""`visual-ground`: the Python API from a terminal."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visual_ground.errors import GroundingError
from visual_ground.prompts import IMAGE_SUFFIXES

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
    train = commands.add_parser("train", help="train an adapter on image-caption pairs", description=TRAIN)
    train.add_argument("lm", help="Hub id or folder of a causal LM")
    train.add_argument("vision", help='Hub id or folder of an encoder, "open_clip:..." or "timm:..."')
    train.add_argument("--output", default="grounded", help="folder for the adapter, checkpoints, logs and pictures")
    train.add_argument("--validation", metavar="DATASET", help="pairs to evaluate on at every checkpoint")
    train.add_argument("--steps", type=int, default=2000)
    train.add_argument("--batch-size", type=int, help="pairs per step and process; default 64, or all there are")
    train.add_argument("--learning-rate", type=float, default=1e-3)
    train.add_argument("--visual-tokens", type=int, default=1, help="input rows per image")
    train.add_argument("--save-steps", type=int, default=200, help="steps between checkpoints")
    train.add_argument("--workers", type=int, default=0, help="processes that read and decode")
    train.add_argument("--streaming", action="store_true", help="read row by row, without a copy on the disk")
    train.add_argument("--no-cache", action="store_true", help="run the encoder in every step, keep no features")
    train.add_argument("--max-skipped", type=float, default=0.01, help="part of the pairs that may be unreadable")
    train.add_argument("--bf16", action="store_true", help="load the LM in bfloat16")
    train.add_argument("--seed", type=int, default=0)
    index = commands.add_parser("index", help="embed images so that they can be found")
    chat = commands.add_parser("chat", help="talk; paths to images in a line are shown to the model")
    evaluate = commands.add_parser("eval", help="recall both ways and caption pair accuracy, as JSON")
    push = commands.add_parser("push", help="upload an adapter to the Hub")
    for command in (index, chat, evaluate, push):
        command.add_argument("lm", help="Hub id or folder of the LM")
        command.add_argument("adapter", help="Hub id or folder of the adapter")
    index.add_argument("images", nargs="+", help="image files, or folders of them")
    index.add_argument("--output", required=True, help="folder for the index")
    chat.add_argument("--index", help="folder of an index")
    chat.add_argument("--once", metavar="PROMPT", help="answer one prompt and stop")
    chat.add_argument("--html", help="write the last answer as a page")
    chat.add_argument("--max-new-tokens", type=int, default=64)
    chat.add_argument("--ret-bias", type=float, default=0.0, help="added to the logit of [RET]")
    push.add_argument("repository", help="Hub id of the new repository")
    for command in (train, evaluate):
        command.add_argument("dataset", help="folder, file, pattern of files, or Hub id: see docs/training.md")
        command.add_argument("--split", default="train")
        command.add_argument("--image-column", help="found by its name where not given")
        command.add_argument("--caption-column", help="found by its name where not given")
        command.add_argument("--image-folder", help="where relative paths start; beside the table where not given")
    names = ((train, _train), (index, _index), (chat, _chat), (evaluate, _evaluate), (push, _push))
    for command, run in names:
        command.set_defaults(run=run)
    return parser


def _train(options: argparse.Namespace) -> None:
    from transformers import set_seed

    from visual_ground import GroundingConfig, GroundingTrainer, GroundingTrainingArguments, ground
    from visual_ground.training.sources import SHUFFLED, load_rows

    rows = load_rows(options.dataset, options.split, options.streaming)
    columns = _columns(options, rows)
    validation = None if options.validation is None else load_rows(options.validation, options.split)
    rows = rows.shuffle(seed=options.seed, buffer_size=SHUFFLED) if options.streaming else rows
    most = 64 if options.streaming else max(2, min(64, len(rows) // int(os.environ.get("WORLD_SIZE", 1))))
    args = GroundingTrainingArguments(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size or most,
        learning_rate=options.learning_rate,
        save_steps=options.save_steps,
        save_total_limit=2,
        eval_strategy="no" if validation is None else "steps",
        eval_steps=options.save_steps,
        logging_steps=min(10, options.steps),
        dataloader_num_workers=options.workers,
        cache_features=not options.no_cache,
        image_column=columns.image,
        caption_column=columns.caption,
        image_folder=columns.folder,
        max_skipped=options.max_skipped,
        seed=options.seed,
    )
    # The adapter's start values must be the same when a killed run starts again.
    set_seed(options.seed)
    config = GroundingConfig(num_visual_tokens=options.visual_tokens)
    model = ground(_language_model(options), options.vision, config=config)
    trainer = GroundingTrainer(model, args, rows, validation)
    trainer.train(resume_from_checkpoint=True)
    if trainer.args.should_save:
        model.save_pretrained(options.output)


def _language_model(options: argparse.Namespace) -> Any:
    if not options.bf16:
        return options.lm
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(options.lm, dtype=torch.bfloat16)


def _columns(options: argparse.Namespace, rows: Any) -> Any:
    """Find a dataset's columns, and where its paths start."""
    from dataclasses import replace

    from visual_ground.training.sources import column_names, find_columns, folder_of

    columns = find_columns(list(column_names(rows)), options.image_column, options.caption_column)
    return replace(columns, folder=options.image_folder or folder_of(options.dataset))


def _index(options: argparse.Namespace) -> None:
    from visual_ground import ImageIndex

    found: list[str] = []
    for name in options.images:
        inside = sorted(str(p) for p in Path(name).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        found += inside if os.path.isdir(name) else [name]
    ImageIndex.build(_load(options), found, ids=found).save_pretrained(options.output)


def _chat(options: argparse.Namespace) -> None:
    from visual_ground import ImageIndex

    model = _load(options)
    index = None if options.index is None else ImageIndex.from_pretrained(options.index)
    messages: list[dict[str, Any]] = []
    while line := options.once or input("> "):
        parts = _parts(line)
        prompt: Any = [parts]
        if model.tokenizer.chat_template:
            messages.append({"role": "user", "content": _content(parts)})
            prompt = messages
        answer = model.generate(prompt, index, options.max_new_tokens, ret_bias=options.ret_bias)[0]
        messages.append({"role": "assistant", "content": answer.text})
        print(answer)
        if options.html:
            answer.save(options.html)
        if options.once:
            return


def _evaluate(options: argparse.Namespace) -> None:
    import torch

    from visual_ground.evaluation import caption_pair_accuracy, retrieval_recall
    from visual_ground.training.sources import load_rows

    rows = load_rows(options.dataset, options.split)
    columns = _columns(options, rows)
    model = _load(options)
    captions = [columns.captions(row)[0] for row in rows]
    parts = []
    for start in range(0, len(rows), 32):
        images = [columns.images(rows[i])[0] for i in range(start, min(start + 32, len(rows)))]
        parts.append(model.vision(model.vision.preprocess(images)))
    features = torch.cat(parts)
    results = retrieval_recall(model, captions, features)
    results["caption_pair_accuracy"] = caption_pair_accuracy(model, captions, features)
    print(json.dumps({"pairs": len(rows), **results}, indent=2))


def _push(options: argparse.Namespace) -> None:
    print(_load(options).push_to_hub(options.repository))


def _load(options: argparse.Namespace) -> Any:
    from visual_ground import GroundedModel

    return GroundedModel.from_pretrained(options.lm, options.adapter)


def _parts(line: str) -> list[str]:
    """Cut a line into texts and the paths of the images in it."""
    parts = [""]
    for word in line.split():
        if Path(word).suffix.lower() in IMAGE_SUFFIXES and os.path.isfile(word):
            parts += [word, ""]
        else:
            parts[-1] = f"{parts[-1]} {word}".strip()
    return [part for part in parts if part]


def _content(parts: Sequence[str]) -> list[dict[str, str]]:
    return [
        {"type": "image", "image": part} if os.path.isfile(part) else {"type": "text", "text": part} for part in parts
    ]


if __name__ == "__main__":
    raise SystemExit(main())
