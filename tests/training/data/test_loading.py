"""Datasets of every kind become the same examples."""

import io
import json
import os
import subprocess
import sys
import tarfile

import datasets
import pytest
import torch

from tests.paths import ROOT
from tests.tiny import grounded, picture
from visual_ground import GroundingError, GroundingTrainer, GroundingTrainingArguments
from visual_ground.errors import GroundingTypeError, GroundingValueError
from visual_ground.training.data.loading import column_names, find_columns, folder_of, load_rows

# Files that the datasets library leaves open.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
]
COUNT = 12


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def caption(i):
    return f"w{10 + i} w{20 + i} w9"


def png(i):
    file = io.BytesIO()
    picture(i).save(file, "PNG")
    return file.getvalue()


def write_shards(folder, count=COUNT, shards=2, damaged=()):
    """Write shards as img2dataset does: a jpg, txt and json member for each pair, and a table beside each shard."""
    folder.mkdir()
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(shard, count, shards):
                image = b"no image" if i in damaged else png(i)
                about = json.dumps({"caption": caption(i), "key": f"{i:09d}", "status": "success"}).encode()
                for suffix, data in (("jpg", image), ("txt", caption(i).encode()), ("json", about)):
                    member = tarfile.TarInfo(f"{i:09d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        datasets.Dataset.from_dict({"caption": ["x"], "url": ["y"]}).to_parquet(folder / f"{shard:05d}.parquet")
    return str(folder)


def write(kind, folder):
    """Write the same pairs as a dataset of a kind; return its name."""
    if kind == "webdataset":
        return write_shards(folder / "shards")
    for i in range(COUNT):
        (folder / f"{i}.png").write_bytes(png(i))
    names = [f"{i}.png" for i in range(COUNT)]
    if kind == "imagefolder":
        (folder / "metadata.csv").write_text(
            "\n".join(["file_name,text", *[f"{n},{caption(i)}" for i, n in enumerate(names)]])
        )
        return str(folder)
    if kind == "tsv":
        (folder / "cc3m.tsv").write_text(
            "\n".join(["caption\timage", *[f"{caption(i)}\t{n}" for i, n in enumerate(names)]])
        )
        return str(folder / "cc3m.tsv")
    if kind == "json":
        lines = [json.dumps({"image": n, "captions": [caption(i), " ", "w5"]}) for i, n in enumerate(names)]
        (folder / "pairs.jsonl").write_text("\n".join(lines))
        return str(folder / "pairs.jsonl")
    rows = datasets.Dataset.from_dict(
        {"picture": [png(i) for i in range(COUNT)], "said": [caption(i) for i in range(COUNT)]}
    )
    rows.cast_column("picture", datasets.Image()).to_parquet(folder / "pairs.parquet")
    return str(folder / "pairs.parquet")


def arguments(folder, **changes):
    settings = dict(output_dir=str(folder / "run"), per_device_train_batch_size=4, max_steps=3, logging_steps=1, seed=3)
    settings |= dict(save_strategy="no", disable_tqdm=True, use_cpu=True, report_to="none")
    return GroundingTrainingArguments(**{**settings, **changes})


def columns_of(rows, name, **given):
    columns = find_columns(list(column_names(rows)), **given)
    return dict(image_column=columns.image, caption_column=columns.caption, image_folder=folder_of(name))


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
@pytest.mark.parametrize("kind", ["webdataset", "imagefolder", "tsv", "json", "parquet"])
def test_every_kind_gives_the_same_pairs(kind, streaming, tmp_path):
    name = write(kind, tmp_path)
    rows = load_rows(name, streaming=streaming)
    given = dict(image="picture", caption="said") if kind == "parquet" else {}
    model = grounded()
    trainer = GroundingTrainer(model, arguments(tmp_path, **columns_of(rows, name, **given)), rows)
    examples = trainer.train_dataset.take(COUNT) if streaming else [trainer.train_dataset[i] for i in range(COUNT)]
    assert len({example["group"] for example in examples}) == COUNT
    features = {}
    for example in examples:
        features[example["caption"]] = example["image_features"]
    wanted = {caption(i): model.vision(model.vision.preprocess([picture(i)]))[0] for i in range(COUNT)}
    common = set(features) & set(wanted)
    assert common if kind == "json" else set(features) == set(wanted)
    assert set(features) <= {*wanted, "w5"}
    for text in common:
        assert torch.allclose(features[text], wanted[text], atol=1e-3)
    trainer.train()
    assert trainer.state.global_step == 3


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
def test_unreadable_images_are_skipped_up_to_a_part(tmp_path, streaming, caplog):
    name = write_shards(tmp_path / "shards", damaged=[4])
    rows, columns = load_rows(name, streaming=streaming), dict(image_column="jpg", caption_column="txt")
    for cached in (True, False):
        args = arguments(tmp_path, max_skipped=0.1, cache_features=cached, max_steps=6, **columns)
        trainer = GroundingTrainer(grounded(), args, rows)
        trainer.train()
        assert "000000004.jpg' is not an image" in caplog.text
        caplog.clear()
    if not streaming:
        with pytest.raises(GroundingValueError, match=r"1 of 12 .*max_skipped=0.05(.|\n)*000000004\.jpg"):
            GroundingTrainer(grounded(), arguments(tmp_path, max_skipped=0.05, **columns), rows)
    bad = load_rows(write_shards(tmp_path / "bad", damaged=range(COUNT)), streaming=streaming)
    with pytest.raises(GroundingValueError, match="cannot be used"):
        GroundingTrainer(grounded(), arguments(tmp_path, max_skipped=0.1, **columns), bad)


def test_bad_columns_and_captions_are_named_before_the_first_step(tmp_path):
    rows = datasets.Dataset.from_dict({"image": ["a.png"] * 4, "caption": [1, 2, 3, 4]})
    for stream in (False, True):
        given = rows.to_iterable_dataset() if stream else rows
        with pytest.raises(GroundingTypeError, match="caption 1, a int"):
            GroundingTrainer(grounded(), arguments(tmp_path), given)
        with pytest.raises(GroundingValueError, match=r"no columns \['text'\].*\['caption', 'image'\]"):
            GroundingTrainer(grounded(), arguments(tmp_path, caption_column="text"), given)
    with pytest.raises(GroundingValueError, match=r"one for each caption.*'picture'"):
        find_columns(["image", "picture"])
    with pytest.raises(GroundingError, match="cannot be loaded"):
        load_rows(str(tmp_path / "none.parquet"))


def test_features_of_another_encoder_are_refused(tmp_path):
    rows = [{"image_features": [0.5] * 12, "caption": caption(i)} for i in range(COUNT)]
    trainer = GroundingTrainer(grounded(), arguments(tmp_path), rows)
    trainer.train()
    with pytest.raises(GroundingValueError, match="width 7.*gives 12"):
        GroundingTrainer(grounded(), arguments(tmp_path), [dict(row, image_features=[0.5] * 7) for row in rows])


def test_a_stream_needs_steps_or_a_cache(tmp_path):
    rows = load_rows(write_shards(tmp_path / "shards"), streaming=True)
    columns = dict(image_column="jpg", caption_column="txt", max_steps=-1, num_train_epochs=2)
    trainer = GroundingTrainer(grounded(), arguments(tmp_path, **columns), rows)
    assert trainer.args.max_steps == 6
    with pytest.raises(GroundingValueError, match="max_steps"):
        GroundingTrainer(grounded(), arguments(tmp_path, cache_features=False, **columns), rows)
    with pytest.raises(GroundingTypeError, match="take"):
        GroundingTrainer(grounded(), arguments(tmp_path, **columns), eval_dataset=rows)


def test_workers_change_nothing_in_a_table_and_nothing_is_shown_twice(tmp_path):
    rows = load_rows(write_shards(tmp_path / "shards"))
    orders = []
    for workers in (0, 2):
        args = arguments(
            tmp_path, image_column="jpg", caption_column="txt", dataloader_num_workers=workers, cache_features=False
        )
        trainer = GroundingTrainer(grounded(), args, rows)
        batches = list(trainer.get_train_dataloader())
        orders.append([batch["rows"].tolist() for batch in batches])
        assert sorted(sum(orders[-1], [])) == list(range(COUNT))
    assert orders[0] == orders[1]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_pairs(tmp_path):
    code = "import json; from many_pairs import run; print(json.dumps(run(3000)))"
    folder = ROOT / "benchmarks" / "training"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["cached"] == 3000 and found["steps"] == 60
    assert max(found["growth_mb_after_a_quarter"].values()) < 40
