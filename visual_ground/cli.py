"""`visual-ground`: the Python API from a terminal."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visual_ground.errors import GroundingError, GroundingFileError, GroundingValueError
from visual_ground.prompts import IMAGE_SUFFIXES


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
    train = commands.add_parser("train", help="train an adapter on image-caption pairs")
    train.add_argument("lm", help="Hub id or folder of a causal LM")
    train.add_argument("vision", help='Hub id or folder of an encoder, "open_clip:..." or "timm:..."')
    train.add_argument("--output", required=True, help="folder for the adapter and its checkpoints")
    train.add_argument("--steps", type=int, default=2000)
    train.add_argument("--batch-size", type=int, default=64)
    train.add_argument("--learning-rate", type=float, default=1e-3)
    train.add_argument("--visual-tokens", type=int, default=1, help="input rows per image")
    train.add_argument("--seed", type=int, default=0)
    index = commands.add_parser("index", help="embed images so that they can be found")
    chat = commands.add_parser("chat", help="talk; paths to images in a line are shown to the model")
    evaluate = commands.add_parser("eval", help="recall both ways and caption pair accuracy, as JSON")
    push = commands.add_parser("push", help="upload a saved adapter or index to the Hub, as one commit")
    official = commands.add_parser("import-fromage", help="turn an official FROMAGe checkpoint into an adapter")
    official.add_argument("folder", help="holds model_args.json, the checkpoint and cc3m_embeddings*.pkl, if any")
    official.add_argument("--output", required=True, help="folder for the adapter; an index goes into its index/")
    official.add_argument("--checkpoint", help="where it is not pretrained_ckpt.pth.tar in the folder")
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
    push.add_argument("folder", help="folder of the adapter or index")
    push.add_argument("repository", help="Hub id of the repository, made where it does not exist")
    push.add_argument("--private", action="store_true", default=None, help="a new repository is private")
    push.add_argument("--revision", help="branch, made where it does not exist")
    push.add_argument("--message", help="first line of the commit")
    push.add_argument("--create-pr", action="store_true", help="open a pull request")
    push.add_argument("--copy-images", action="store_true", help="publish an index's local image files too")
    transfer = commands.add_parser("transfer", help="move an adapter to another LM; its image indexes stay valid")
    transfer.add_argument("adapter", help="Hub id or folder of the adapter")
    transfer.add_argument("lm", help="Hub id or folder of the LM that it moves to")
    transfer.add_argument("--output", required=True, help="folder for the new adapter")
    transfer.add_argument("--dataset", help="image-caption pairs to fit with, instead of the adapter's anchors")
    transfer.add_argument("--vision", help="the encoder, where the adapter names none")
    transfer.add_argument("--steps", type=int, default=10, help="training steps after the closed form")
    transfer.set_defaults(run=_transfer)
    for command in (train, evaluate):
        command.add_argument(
            "dataset", help="folder of images with metadata, a .csv/.tsv/.json/.parquet file, or Hub id"
        )
    for command in (train, evaluate, transfer):
        command.add_argument("--split", default="train")
        command.add_argument("--image-column", default="image")
        command.add_argument("--caption-column", default="caption")
    names = ((train, _train), (index, _index), (chat, _chat), (evaluate, _evaluate), (push, _push))
    official.set_defaults(run=_import_official)
    for command, run in names:
        command.set_defaults(run=run)
    return parser


def _train(options: argparse.Namespace) -> None:
    from visual_ground import GroundingConfig, GroundingTrainer, GroundingTrainingArguments, ground

    model = ground(options.lm, options.vision, config=GroundingConfig(num_visual_tokens=options.visual_tokens))
    args = GroundingTrainingArguments(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
    )
    trainer = GroundingTrainer(model, args, _pairs(options))
    trainer.train()
    model.save_pretrained(options.output)


def _index(options: argparse.Namespace) -> None:
    from visual_ground import ImageIndex

    found: list[str] = []
    for name in options.images:
        inside = sorted(str(p) for p in Path(name).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        found += inside if os.path.isdir(name) else [name]
    ImageIndex.build(_load(options), found, ids=found).save_pretrained(options.output)


def _chat(options: argparse.Namespace) -> None:
    from visual_ground import ImageIndex
    from visual_ground.links import LinkRules

    model = _load(options)
    rules = LinkRules(hosts=tuple(options.host), folders=tuple(options.images))
    index = None if options.index is None else ImageIndex.from_pretrained(options.index, rules)
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

    model, rows = _load(options), _pairs(options)
    captions = [row["caption"] for row in rows]
    batches = [[row["image"] for row in rows[i : i + 32]] for i in range(0, len(rows), 32)]
    features = torch.cat([model.vision(model.vision.preprocess(images)) for images in batches])
    results = retrieval_recall(model, captions, features)
    results["caption_pair_accuracy"] = caption_pair_accuracy(model, captions, features)
    print(json.dumps({"pairs": len(rows), **results}, indent=2))
    if options.record:
        where = {"revision": options.dataset_revision, "split": options.split}
        model.report = model.report.measured(options.record, results, len(rows), **where)
        model.save_pretrained(options.adapter)


def _push(options: argparse.Namespace) -> None:
    """Push what the folder holds; no model is loaded."""
    from visual_ground import ImageIndex
    from visual_ground.hub import PushOptions
    from visual_ground.index_folder import ENTRIES_FILE
    from visual_ground.links import LinkRules
    from visual_ground.sharing import push_saved

    where = PushOptions(options.private, options.revision, None, options.message, options.create_pr)
    if not Path(options.folder, ENTRIES_FILE).is_file():
        print(push_saved(options.folder, options.repository, where))
        return
    # The folder is the user's own, and so are the images that it speaks of.
    rules = LinkRules(folders=(Path(options.folder).absolute().anchor,)) if options.copy_images else None
    index = ImageIndex.from_pretrained(options.folder, rules)
    arguments = (where.private, where.revision, where.token, where.commit_message, where.create_pr)
    print(index.push_to_hub(options.repository, *arguments, copy_images=options.copy_images))


def _transfer(options: argparse.Namespace) -> None:
    from dataclasses import replace

    from visual_ground.anchors import Anchors
    from visual_ground.transfer import ImageSide, Refinement, transfer
    from visual_ground.vision import load_vision

    source = ImageSide.load(options.adapter)
    name = options.vision or source.vision
    if name is None:
        raise GroundingValueError("This adapter names no vision encoder. Pass --vision.")
    source = replace(source, vision=load_vision(name))
    anchors = None if options.dataset is None else Anchors.from_rows(_pairs(options), source.vision)
    transfer(source, options.lm, anchors=anchors, refinement=Refinement(options.steps)).save_pretrained(options.output)


def _import_official(options: argparse.Namespace) -> None:
    from visual_ground.fromage import read_official, read_official_index

    model, index = read_official(options.folder, options.checkpoint), read_official_index(options.folder)
    model.save(options.output)
    if index is not None:
        index.save_pretrained(Path(options.output) / "index")
    print(f"adapter of {model.lm} with {model.vision}; {0 if index is None else len(index)} images in its index")


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


def _pairs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Load a dataset's images and captions; file names in it are relative to its folder."""
    from datasets import load_dataset

    path = Path(options.dataset)
    kinds = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
    try:
        if path.is_dir():
            loaded = load_dataset("imagefolder", data_dir=str(path), split=options.split)
        elif path.suffix in kinds:
            more = {"sep": "\t"} if path.suffix == ".tsv" else {}
            loaded = load_dataset(kinds[path.suffix], data_files=str(path), split=options.split, **more)
        else:
            loaded = load_dataset(options.dataset, split=options.split)
    except (OSError, ValueError) as error:
        raise GroundingFileError(f"The dataset {options.dataset!r} cannot be loaded: {error}") from error
    image, caption = options.image_column, options.caption_column
    if missing := [name for name in (image, caption) if name not in loaded.column_names]:
        raise GroundingValueError(f"The dataset has no columns {missing}; its columns are {loaded.column_names}.")
    rows = [{"image": row[image], "caption": row[caption]} for row in loaded]
    for row in rows:
        if isinstance(row["image"], str):
            row["image"] = str(path.parent / row["image"])
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
