"""Arguments that several commands have, and what is loaded by them."""

from __future__ import annotations

import argparse
import math
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from visual_ground.errors import GroundingFileError, GroundingStateError

if TYPE_CHECKING:
    from visual_ground.index.image_index import ImageIndex
    from visual_ground.index.milvus.image_index import MilvusImageIndex
    from visual_ground.model import GroundedModel
    from visual_ground.training.data.columns import Columns

    # argparse gives the object that parsers of commands are added to no public type.
    Commands: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]


def add_lm_options(parser: argparse.ArgumentParser) -> None:
    """Add the positional arguments and the options with which `ground_models` makes a new adapter."""
    parser.add_argument("lm", help="Hub id or folder of a causal LM")
    parser.add_argument("vision", help='Hub id or folder of an encoder, "open_clip:..." or "timm:..."')
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="load the LM in bfloat16, or as it was saved; bfloat16 where the processor multiplies it by itself",
    )
    parser.add_argument("--visual-tokens", metavar="N", type=whole(1), default=1, help="image tokens per image; 1")


def ground_models(options: argparse.Namespace) -> GroundedModel:
    """Return a new adapter between the LM and the encoder that the options name."""
    import torch

    from visual_ground import GroundingConfig, ground
    from visual_ground.lm.base.loading import load_lm, multiplies_bfloat16

    device = "cuda" if torch.cuda.is_available() else "cpu"
    in_bfloat16 = multiplies_bfloat16(device) if options.bf16 is None else options.bf16
    lm, tokenizer = load_lm(options.lm, dtype=torch.bfloat16 if in_bfloat16 else None)
    if in_bfloat16 and options.bf16 is None:
        print(
            "The language model is read in bfloat16, about twice as fast; --no-bf16 reads it as it was saved.",
            file=sys.stderr,
        )
    return ground(lm, options.vision, tokenizer, config=GroundingConfig(num_visual_tokens=options.visual_tokens))


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the positional arguments that `load_model` reads."""
    parser.add_argument("lm", help="Hub id or folder of the LM")
    parser.add_argument("adapter", help="Hub id or folder of the adapter")
    add_vision_option(parser)


def add_vision_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the vision encoder."""
    parser.add_argument(
        "--vision", metavar="NAME", help="the vision encoder, where the adapter names none or it has moved"
    )


def whole(least: int, most: float = math.inf) -> Callable[[str], int]:
    """Return a type of argparse: whole numbers from `least` to `most`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            span = f"of at least {least}" if most == math.inf else f"from {least} to {most:g}"
            raise argparse.ArgumentTypeError(f"must be a whole number {span}, got {text!r}")
        return value

    return read


def number(least: float = -math.inf, most: float = math.inf) -> Callable[[str], float]:
    """Return a type of argparse: finite numbers from `least` to `most`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and least <= value <= most):
            span = f" from {least:g} to {most:g}" if math.isfinite(least) else ""
            raise argparse.ArgumentTypeError(f"must be a finite number{span}, got {text!r}")
        return value

    return read


def place(text: str) -> str:
    """Read the path of a file or folder, as a type of argparse; an empty one would lead into the working folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"must be the path of a file or folder, got {text!r}")
    return text


def check_places(file: str | None = None, folder: str | None = None) -> None:
    """Raise GroundingFileError if a folder is in the place of a file to write, or a file in that of a folder.

    What is written comes last, after hours perhaps, and what is wrong is said before.
    """
    if file and os.path.isdir(file):
        raise GroundingFileError(f"The output is a file, and {file!r} is a folder. Give the name of a file.")
    if folder and os.path.exists(folder) and not os.path.isdir(folder):
        raise GroundingFileError(f"The output is a folder, and {folder!r} is a file. Give the name of a folder.")


def add_address(parser: argparse.ArgumentParser, port: int) -> None:
    """Add the options that say where to listen, by default at this port of this machine; see `check_address`."""
    parser.add_argument("--address", default="127.0.0.1", help="where to listen; 0.0.0.0 lets other machines in")
    parser.add_argument("--port", metavar="N", type=whole(0, 65535), default=port, help=f"{port} where not given")


def check_address(address: str, port: int) -> None:
    """Raise GroundingStateError if nothing can listen at an address; loading the models before would take long."""
    try:
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        socket.create_server((address, port), family=family).close()
    except OSError as error:
        raise GroundingStateError(
            f"Nothing can listen at {address}:{port}: {error.strerror or error}. Is something else using it? Choose "
            "another with --port, or another --address of this machine."
        ) from error


def add_max_images(parser: argparse.ArgumentParser) -> None:
    """Add the option that says how many images an answer has at most."""
    parser.add_argument("--max-images", metavar="N", type=whole(0), help="images of an answer; a few where not given")


def add_answer_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how long answers are and how many images they have; see `answer_options`."""
    parser.add_argument("--max-new-tokens", metavar="N", type=whole(1), help="length of an answer; 64 or the LM's own")
    add_max_images(parser)
    parser.add_argument("--ret-bias", metavar="X", type=number(), help="added to the logit of [RET]; 0")
    parser.add_argument(
        "--complete-sentences", action="store_true", default=None, help="end answers with their last whole sentence"
    )


def answer_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return what was given of the options of `add_answer_options`, for `GroundedModel.generate`."""
    names = ("max_new_tokens", "max_images", "ret_bias", "complete_sentences")
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def load_model(options: argparse.Namespace) -> GroundedModel:
    """Return the grounded model that the arguments name, on the device that they name; else on a GPU if any."""
    from visual_ground import GroundedModel
    from visual_ground.processes import Processes

    model = GroundedModel.from_pretrained(options.lm, options.adapter, options.vision)
    if not getattr(model.lm, "is_quantized", False):  # Such an LM has been put where it runs.
        model.to(getattr(options, "device", None) or Processes.launched().device)
    return model


def add_index_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `load_index` reads."""
    parser.add_argument("--index", metavar="DIR", help="folder or Hub id of an index, or its address in Milvus")
    parser.add_argument(
        "--images", metavar="DIR", action="append", default=[], help="folder that the index's paths may lead into"
    )
    parser.add_argument(
        "--host", metavar="NAME", action="append", default=[], help="host that its images may be fetched from"
    )


def load_index(options: argparse.Namespace) -> ImageIndex | MilvusImageIndex | None:
    """Return the index that the options name, if any."""
    return None if options.index is None else open_index(options.index, options)


def open_index(name: str, options: argparse.Namespace | None = None) -> ImageIndex | MilvusImageIndex:
    """Return the index in a folder, on the Hub, or in Milvus: `images.db`, `http://localhost:19530#photos`.

    Args:
        name: its folder, Hub id or address.
        options: which hosts and folders its pictures may come from; one that was saved on this machine opens its own.
            None names none.
    """
    from visual_ground import ImageIndex
    from visual_ground.index.milvus.connection import named_place
    from visual_ground.index.milvus.image_index import MilvusImageIndex
    from visual_ground.index.remote_images import LinkRules

    rules = None
    if options is not None:
        rules = LinkRules(hosts=tuple(options.host), folders=tuple(options.images))
    if (place := named_place(name)) is not None:
        return MilvusImageIndex.open(*place, rules=rules)
    return ImageIndex.from_pretrained(name, rules)


def add_dataset_argument(parser: argparse.ArgumentParser) -> None:
    """Add the positional argument that names a dataset."""
    parser.add_argument("dataset", help="folder, file, pattern of files, or Hub id: see docs/training.md")


def add_max_skipped(parser: argparse._ActionsContainer) -> None:
    """Add the option that says how much of a dataset may be left out."""
    parser.add_argument(
        "--max-skipped", metavar="X", type=number(0, 1), default=0.01, help="part that may be unreadable; 0.01"
    )


def add_column_options(parser: argparse._ActionsContainer) -> None:
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


def pair_settings(options: argparse.Namespace, rows: Any) -> dict[str, Any]:
    """Return what `fit` and `train` tell `GroundingTrainingArguments` alike: which pairs are read, and bars."""
    columns = columns_of(options, rows)
    return {
        "image_column": columns.image,
        "caption_column": columns.caption,
        "image_folder": columns.folder,
        "max_skipped": options.max_skipped,
        "disable_tqdm": False,  # Else it follows the verbosity of transformers, whose warnings commands keep back.
    }
