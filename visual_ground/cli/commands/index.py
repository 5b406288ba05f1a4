"""`visual-ground index`: embed images so that they can be found, and change an index."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from visual_ground.cli.shared.arguments import (
    add_model_arguments,
    check_places,
    load_model,
    number,
    open_index,
    place,
    whole,
)
from visual_ground.cli.shared.entries import known_id, parsed_filter

if TYPE_CHECKING:
    from visual_ground.cli.shared.arguments import Commands
    from visual_ground.indexing.build import BuildOptions


OPENED = "folder or Hub id of the index, or its address in Milvus: images.db, http://localhost:19530#photos"


def add_parser(commands: Commands) -> argparse.ArgumentParser:
    """Add the command to the others, and return its parser."""
    parser = commands.add_parser("index", help="embed images so that they can be found")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    build = actions.add_parser("build", help="make an index; after a stop, the same command continues it")
    add_model_arguments(build)
    build.add_argument("images", nargs="+", help="image files, folders of them, and tar shards")
    build.add_argument("--output", type=place, required=True, help="folder for the index")
    _add_build_options(build)
    build.set_defaults(act=run_build)
    add = actions.add_parser("add", help="add images, or the entries of another index")
    add_model_arguments(add)
    add.add_argument("index", help="folder of the index")
    add.add_argument("images", nargs="+", help="as for build, or folders of indexes")
    _add_build_options(add)
    add.set_defaults(act=run_add)
    remove = actions.add_parser("remove", help="remove entries")
    remove.add_argument("index", help="folder of the index")
    remove.add_argument("ids", nargs="*", help="their ids")
    remove.add_argument("--filter", help='which entries, as JSON, such as {"licence": "unknown"}')
    remove.set_defaults(act=run_remove)
    _add_readers(actions)
    _add_makers(actions)
    return parser


def run(options: argparse.Namespace) -> None:
    """Do what the action says."""
    options.act(options)


def _add_readers(actions: Commands) -> None:
    search = actions.add_parser("search", help="print the entries nearest to a text or image, as JSON lines")
    add_model_arguments(search)
    search.add_argument("index", help=OPENED)
    search.add_argument("query", help="a text, or the path of an image")
    search.add_argument("-k", metavar="N", type=whole(1), default=10, help="how many; 10")
    search.add_argument("--filter", help='which entries may be found, as JSON, such as {"year": {"ge": 1990}}')
    search.set_defaults(act=run_search)
    info = actions.add_parser("info", help="print what an index holds, as JSON")
    info.add_argument("index", help=OPENED)
    info.set_defaults(act=run_info)


def _add_makers(actions: Commands) -> None:
    accelerate = actions.add_parser("accelerate", help="build a faiss index, which is searched faster, into an index")
    accelerate.add_argument("index", help="folder of the index")
    accelerate.add_argument(
        "--kind", choices=("flat", "hnsw", "ivfpq"), help="by the number of entries where not given"
    )
    accelerate.add_argument(
        "--recall", metavar="X", type=number(0, 1), default=0.95, help="part of the 10 best entries to find; 0.95"
    )
    accelerate.set_defaults(act=run_accelerate)
    convert = actions.add_parser("convert", help="read what other tools wrote, or copy an index into Milvus")
    convert.add_argument("source", help="folder with img_emb/*.npy and metadata/*.parquet, one .npy file, or an index")
    convert.add_argument("--table", help="parquet file of the metadata, for one .npy file")
    convert.add_argument("--output", type=place, required=True, help="folder for the index, or an address in Milvus")
    convert.set_defaults(act=run_convert)


def _add_build_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size", metavar="N", type=whole(1), default=32, help="images that the encoder runs at once; 32"
    )
    parser.add_argument(
        "--workers", metavar="N", type=whole(0), default=0, help="processes that read images; 0 for none besides this"
    )
    parser.add_argument("--thumbnails", metavar="PIXELS", type=whole(1), help="keep a thumbnail of each image")
    parser.add_argument("--half", action="store_true", help="keep vectors as float16, half as large")
    parser.add_argument(
        "--caption-weight",
        metavar="X",
        type=number(0, 1),
        help="part of a caption in its image's vector; 0, or that of the index",
    )
    parser.add_argument("--shard", metavar="I/N", help="every N-th image from the I-th on, from 0")


def _build_options(options: argparse.Namespace, caption_weight: float = 0.0) -> BuildOptions:
    from visual_ground.errors import GroundingValueError
    from visual_ground.indexing.build import BuildOptions

    shard = None
    if options.shard is not None:
        first, _, step = options.shard.partition("/")
        if not first.isdecimal() or not step.isdecimal():
            raise GroundingValueError(f"--shard must be two numbers such as 0/4, got {options.shard!r}.")
        shard = int(first), int(step)
    return BuildOptions(
        options.batch_size,
        options.workers,
        options.thumbnails,
        options.half,
        shard=shard,
        caption_weight=caption_weight if options.caption_weight is None else options.caption_weight,
    )


def run_build(options: argparse.Namespace) -> None:
    """Embed images into an index, and say how many."""
    from visual_ground.indexing.build import build_index
    from visual_ground.processes import Processes

    check_places(folder=options.output)
    report = build_index(load_model(options), options.images, options.output, _build_options(options))
    if not Processes.launched().is_main:
        return
    for name, why in report.unreadable:
        print(f"visual-ground: left out {name}: {why}", file=sys.stderr)
    print(
        f"{report.num_images} images in {options.output}, {len(report.unreadable)} unreadable, "
        f"{report.images_per_second:.1f} images/s"
    )


def run_add(options: argparse.Namespace) -> None:
    """Add images and other indexes to an index."""
    import tempfile
    from pathlib import Path

    from visual_ground import ImageIndex
    from visual_ground.index.files import ENTRIES_FILE
    from visual_ground.indexing.build import build_index

    index = ImageIndex.from_pretrained(options.index)
    before = len(index)
    images = []
    for name in options.images:
        if Path(name, ENTRIES_FILE).is_file():
            index.merge(ImageIndex.from_pretrained(name))
        else:
            images.append(name)
    with tempfile.TemporaryDirectory() as folder:
        if images:
            model = load_model(options)
            index.check_model(model.image_space)  # Embedding takes long: what is wrong is said before.
            build_index(model, images, folder, _build_options(options, index.info()["caption_weight"]))
            index.merge(ImageIndex.from_pretrained(folder))
        index.save_pretrained(options.index)
    print(f"{len(index) - before} entries added, {len(index)} in all")


def run_remove(options: argparse.Namespace) -> None:
    """Remove entries from an index, by id or by filter."""
    from visual_ground import ImageIndex
    from visual_ground.errors import GroundingValueError

    index = ImageIndex.from_pretrained(options.index)
    ids: list[str | int] = [known_id(index, one) for one in options.ids]
    if options.filter is not None:
        ids += index.select(parsed_filter(options.filter))
    elif not ids:
        raise GroundingValueError("Name the entries to remove by their ids, or by --filter.")
    ids = list(dict.fromkeys(ids))
    index.remove(ids)
    index.save_pretrained(options.index)
    print(f"{len(ids)} entries removed, {len(index)} left")


def run_search(options: argparse.Namespace) -> None:
    """Print the entries nearest to a text or image."""
    from visual_ground.generation.generate import check_index
    from visual_ground.prompts.types import is_image_file

    model, index = load_model(options), open_index(options.index)
    check_index(index, model.active)
    is_image = is_image_file(options.query)
    query = model.embed_images([options.query]) if is_image else model.embed_text(options.query)
    found = index.search(query.cpu(), options.k, None if options.filter is None else parsed_filter(options.filter))
    for position, score in zip(found.positions[0].tolist(), found.scores[0].tolist(), strict=True):
        id, image, metadata = index.entry(position)
        line = {"id": id, "score": round(score, 4), "metadata": metadata}
        print(json.dumps({**line, "image": str(image)} if isinstance(image, str) else line, ensure_ascii=False))


def run_info(options: argparse.Namespace) -> None:
    """Print what an index holds."""
    print(json.dumps(open_index(options.index).info(), indent=2, ensure_ascii=False))


def run_accelerate(options: argparse.Namespace) -> None:
    """Build a faiss index beside the vectors."""
    from visual_ground.indexing.accelerating import accelerate_index

    engine = accelerate_index(options.index, options.kind, options.recall)
    recall = "" if engine.recall is None else f"; a search finds {100 * engine.recall:.1f} % of the 10 best"
    print(f"{len(engine)} entries in faiss ({engine.kind}){recall}")


def run_convert(options: argparse.Namespace) -> None:
    """Read embeddings that other tools wrote, and copy indexes into Milvus."""
    import tempfile
    from pathlib import Path

    from visual_ground.errors import GroundingValueError
    from visual_ground.index.files import ENTRIES_FILE
    from visual_ground.index.milvus.connection import named_place
    from visual_ground.index.milvus.image_index import MilvusImageIndex
    from visual_ground.indexing.foreign import read_embeddings

    place = named_place(options.output)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.source
        if not Path(folder, ENTRIES_FILE).is_file():
            folder = scratch if place else options.output
            read_embeddings(options.source, options.table).save_pretrained(folder)
        elif place is None:
            raise GroundingValueError(f"{folder!r} is an index already; --output must be an address in Milvus.")
        index = (
            open_index(folder)
            if place is None
            else MilvusImageIndex.from_folder(place[0], folder, place[1], progress=True)
        )
        print(f"{len(index)} entries of width {index.dim} in {options.output}")
