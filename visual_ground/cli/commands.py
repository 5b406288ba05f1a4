"""What each command of `visual-ground` does with its options; the heavy imports wait until one runs."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from visual_ground.prompts.processor import IMAGE_SUFFIXES


def train(options: argparse.Namespace) -> None:
    """Train an adapter, or go on training it."""
    from transformers import set_seed

    from visual_ground import GroundingConfig, GroundingTrainer, GroundingTrainingArguments, ground
    from visual_ground.training.data.loading import SHUFFLED, load_rows

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
    from visual_ground.training.data.loading import column_names, find_columns, folder_of

    columns = find_columns(list(column_names(rows)), options.image_column, options.caption_column)
    return replace(columns, folder=options.image_folder or folder_of(options.dataset))


def index(options: argparse.Namespace) -> None:
    """Embed image files, and those in folders, into an index."""
    from visual_ground import ImageIndex

    found: list[str] = []
    for name in options.images:
        inside = sorted(str(p) for p in Path(name).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        found += inside if os.path.isdir(name) else [name]
    ImageIndex.build(_load(options), found, ids=found).save_pretrained(options.output)


def chat(options: argparse.Namespace) -> None:
    """Answer line by line, or once."""
    from visual_ground import ImageIndex
    from visual_ground.index.remote_images import LinkRules

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


def evaluate(options: argparse.Namespace) -> None:
    """Print what a saved adapter reaches on a dataset."""
    import torch

    from visual_ground.evaluation.retrieval import caption_pair_accuracy, retrieval_recall
    from visual_ground.training.data.loading import load_rows

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
    if options.record:
        where = {"revision": options.dataset_revision, "split": options.split}
        model.active.report = model.active.report.measured(options.record, results, len(rows), **where)
        model.save_pretrained(options.adapter)


def push(options: argparse.Namespace) -> None:
    """Push what the folder holds; no model is loaded."""
    from visual_ground import ImageIndex
    from visual_ground.adapter.files import push_saved
    from visual_ground.index.files import ENTRIES_FILE
    from visual_ground.index.remote_images import LinkRules
    from visual_ground.storage.hub import PushOptions

    where = PushOptions(options.private, options.revision, None, options.message, options.create_pr)
    if not Path(options.folder, ENTRIES_FILE).is_file():
        print(push_saved(options.folder, options.repository, where))
        return
    # The folder is the user's own, and so are the images that it speaks of.
    rules = LinkRules(folders=(Path(options.folder).absolute().anchor,)) if options.copy_images else None
    index = ImageIndex.from_pretrained(options.folder, rules)
    arguments = (where.private, where.revision, where.token, where.commit_message, where.create_pr)
    print(index.push_to_hub(options.repository, *arguments, copy_images=options.copy_images))


def transfer(options: argparse.Namespace) -> None:
    """Move an adapter to another LM, which alone is loaded."""
    from visual_ground.components import load_encoder
    from visual_ground.training.data.loading import load_rows
    from visual_ground.transferring.collect import collect_anchors
    from visual_ground.transferring.image_side import ImageSide
    from visual_ground.transferring.transfer import transfer

    side, anchors = ImageSide.load(options.adapter), None
    if options.dataset is not None:
        side = replace(side, vision=load_encoder(options.vision, None, side.config, side.provenance)[0])
        rows = load_rows(options.dataset, options.split)
        anchors = collect_anchors(rows, side.vision, _columns(options, rows))
    model = transfer(
        side, options.lm, anchors=anchors, vision_encoder=options.vision and (side.vision or options.vision)
    )
    model.save_pretrained(options.output)


def import_official(options: argparse.Namespace) -> None:
    """Turn an official checkpoint into an adapter, and its image embeddings into an index; no model is loaded."""
    from visual_ground.importers.fromage.convert import read_official, read_official_index

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
