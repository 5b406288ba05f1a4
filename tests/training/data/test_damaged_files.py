"""Files with damage in them: the rows that can be read are, and every other one is named."""

import io
import json
import tarfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tiny import grounded, picture
from visual_ground import GroundingTrainer, GroundingTrainingArguments
from visual_ground.errors import GroundingFileError
from visual_ground.training.data.columns import Skipped, open_rows, usable_rows
from visual_ground.training.data.files import marked_table
from visual_ground.training.data.loading import column_names, find_columns, load_rows

pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
]
COUNT, BAD = 5, 2


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def png(i):
    file = io.BytesIO()
    picture(i).save(file, "PNG")
    return file.getvalue()


def write_shard(path, changes, drop=()):
    with tarfile.open(path, "w") as tar:
        for i in range(COUNT):
            for name, data in ((f"{i}.png", png(i)), (f"{i}.txt", f"w{i + 4} w9".encode()), (f"{i}.json", b"{}")):
                if name not in drop:
                    data = changes.get(name, data)
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return path


def write_lines(path, bad):
    lines = [json.dumps({"image": f"{i}.png", "caption": f"w{i + 4} w9"}).encode() for i in range(COUNT)]
    path.write_bytes(b"\n".join([*lines[:BAD], bad, *lines[BAD + 1 :]]) + b"\n")
    return path


def write_fields(path, bad):
    by = b"\t" if path.suffix == ".tsv" else b","
    lines = [f"{i}.png".encode() + by + f"w{i + 4} w9".encode() for i in range(COUNT)]
    path.write_bytes(b"\n".join([b"image" + by + b"caption", *lines[:BAD], bad, *lines[BAD + 1 :]]))
    return path


def write_list(path, bad):
    entries = [
        b'{"image": "%d.png", "caption": %s}' % (i, bad if i == BAD else b'"w%d w9"' % (i + 4)) for i in range(COUNT)
    ]
    path.write_bytes(b"[" + b",".join(entries) + b"]")
    return path


def write_parquet(path, bad, listed):
    raw = [f"w{i + 4} w9".encode() if i != BAD else bad for i in range(COUNT)]
    buffers = pa.array(raw, pa.binary()).buffers()
    texts = pa.StringArray.from_buffers(COUNT, buffers[1], buffers[2])
    if listed:
        texts = pa.ListArray.from_arrays(pa.array(range(COUNT + 1), pa.int32()), texts)
    pq.write_table(pa.table({"image": [f"{i}.png" for i in range(COUNT)], "caption": texts}), path)
    return path


DAMAGED = {
    "shard, text": lambda d: write_shard(d / "a.tar", {f"{BAD}.txt": b"caf\xe9"}),
    "shard, no image": lambda d: write_shard(d / "a.tar", {}, drop=[f"{BAD}.png"]),
    "shard, no text": lambda d: write_shard(d / "a.tar", {}, drop=[f"{BAD}.txt"]),
    "json, text": lambda d: write_lines(d / "a.jsonl", b'{"image": "2.png", "caption": "caf\xe9"}'),
    "json, line": lambda d: write_lines(d / "a.json", b'{"image": "2.png", "capt'),
    "json, surrogate": lambda d: write_lines(d / "a.jsonl", b'{"image": "2.png", "caption": "a \\ud800"}'),
    "json, no object": lambda d: write_lines(d / "a.jsonl", b"[1]"),
    "csv, text": lambda d: write_fields(d / "a.csv", b"2.png,caf\xe9"),
    "csv, fields": lambda d: write_fields(d / "a.csv", b"2.png,a cat, a dog, a hat"),
    "tsv, fields": lambda d: write_fields(d / "a.tsv", b"2.png\ta cat\t\t"),
    "tsv, return": lambda d: write_fields(d / "a.tsv", b"2.png\tw6\rw9\t"),
    "csv, return": lambda d: write_fields(d / "a.csv", b"2.png,w6\rw9"),
    "csv, open quote": lambda d: write_fields(d / "a.csv", b'2.png,"w6 w9'),
    "json list, text": lambda d: write_list(d / "a.json", b'"caf\xe9"'),
    "json list, surrogate": lambda d: write_list(d / "a.json", b'"a \\ud800"'),
    "parquet": lambda d: write_parquet(d / "a.parquet", b"caf\xe9", listed=False),
    "parquet, lists": lambda d: write_parquet(d / "a.parquet", b"caf\xe9", listed=True),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_one_damaged_row_is_left_out_by_name_and_no_other_is_lost(kind, tmp_path):
    path = str(DAMAGED[kind](tmp_path))
    rows = load_rows(path)
    columns = find_columns(list(column_names(rows)))
    skipped = Skipped(1.0, len(rows))
    rows = open_rows(rows, columns)
    assert usable_rows(rows, columns, skipped) == [i for i in range(COUNT) if i != BAD]
    assert len(skipped.names) == 1 and skipped.names[0].startswith(f"row {BAD}")
    stream = open_rows(load_rows(path, streaming=True), columns)
    usable = [columns.captions(row) for row in stream if columns.problem_of(row) is None and columns.images(row)]
    assert usable == [[f"w{i + 4} w9"] for i in range(COUNT) if i != BAD]


# Words with everything that ends lines or fields in some format, or that some reader takes for nothing.
captions = st.lists(st.sampled_from(["w4", " ", "'", "\u2028", "\x85", "NA", "None", "nan", "é", "#", ","]), min_size=1)


@given(st.lists(captions.map("".join).filter(str.strip), min_size=2, max_size=6), st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_mark_that_is_put_into_a_table_harms_its_own_row_only(own_cache, tmp_path_factory, words, data):
    kind, encoding = data.draw(st.sampled_from([".csv", ".tsv"])), data.draw(st.sampled_from(["utf-8", "utf-16"]))
    mark = data.draw(st.sampled_from(["", '"', "\r"] if kind == ".csv" else ["", '"', "\r", "\t"]))
    bad = data.draw(st.integers(0, len(words) - 1))
    damaged = [mark + text if i == bad else text for i, text in enumerate(words)]
    by, quote = ("\t", "") if kind == ".tsv" else (",", '"')
    lines = [
        f"{i}.png{by}" + (text if i == bad and mark else f"{quote}{text}{quote}") for i, text in enumerate(damaged)
    ]
    path = tmp_path_factory.mktemp("tables") / f"a{kind.upper()}"
    path.write_bytes("\r\n".join([f"image{by}caption", *lines]).encode(encoding))
    rows = {row["image"]: row["caption"] for row in load_rows(str(path)) if row["image"]}
    assert {name: text for name, text in rows.items() if name != f"{bad}.png"} == {
        f"{i}.png": text for i, text in enumerate(words) if i != bad
    }
    assert rows.get(f"{bad}.png", words[bad]).strip('"') == words[bad]


@pytest.mark.parametrize("after", ['",w9"', '"w9, w8"', '"w9"', "w9"])
def test_an_open_quotation_mark_ends_at_no_mark_of_a_later_row(after, tmp_path):
    (tmp_path / "a.csv").write_bytes(f'image,caption\r\n0.png,"w4\r\n1.png,{after}\r\n2.png,w6\r\n'.encode())
    rows = {row["image"]: row["caption"] for row in load_rows(str(tmp_path / "a.csv")) if row["image"]}
    assert rows == {"1.png": after.strip('"'), "2.png": "w6"}


def test_texts_deep_in_a_table_are_marked_too(tmp_path):
    raw = pa.array([b"1.png", b"caf\xe9"], pa.binary())
    texts = pa.StringArray.from_buffers(2, *raw.buffers()[1:])
    files = pa.StructArray.from_arrays([pa.array([png(0), png(1)]), texts], ["bytes", "path"])
    lists = pa.FixedSizeListArray.from_arrays(texts, 1)
    messages = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), files)
    named = pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int8()), texts)
    table = pa.table({"image": files, "lists": lists, "messages": messages, "names": named})
    pq.write_table(table.drop_columns(["names"]), tmp_path / "a.parquet")
    for rows in (load_rows(str(tmp_path / "a.parquet")), load_rows(str(tmp_path / "a.parquet"), streaming=True)):
        assert [row["image"]["path"] for row in rows] == ["1.png", "caf\ufffd"]
        assert [row["lists"] for row in rows] == [["1.png"], ["caf\ufffd"]]
    assert marked_table(table.slice(1))["names"].to_pylist() == ["caf\ufffd"]
    assert marked_table(table.slice(1))["messages"].to_pylist()[0][0]["path"] == "caf\ufffd"


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
def test_training_goes_on_over_damaged_shards_and_counts_what_they_lack(streaming, tmp_path, caplog):
    for name in "abc":
        write_shard(tmp_path / f"{name}.tar", {})
    data = bytearray((tmp_path / "b.tar").read_bytes())
    data[3] ^= 0xFF  # In the first header.
    (tmp_path / "b.tar").write_bytes(data)
    (tmp_path / "d.tar").write_bytes(b"no shard")
    rows = load_rows(str(tmp_path), streaming=streaming)
    settings = dict(output_dir=str(tmp_path / "run"), per_device_train_batch_size=4, max_steps=2, save_strategy="no")
    settings |= dict(image_column="png", caption_column="txt", max_skipped=0.5, use_cpu=True, report_to="none")
    trainer = GroundingTrainer(grounded(), GroundingTrainingArguments(**settings, disable_tqdm=True), rows)
    trainer.train()
    assert "of b.tar are damaged" in caplog.text and "d.tar is no tar file" in caplog.text
    assert "it has no image" in caplog.text


def test_a_changed_shard_is_read_anew(tmp_path):
    for words in (b"w5", b"w6"):
        rows = load_rows(str(write_shard(tmp_path / "a.tar", {"0.txt": words})))
        assert rows[0]["txt"] == words.decode()


def test_members_that_few_samples_have_are_columns(tmp_path):
    rows = load_rows(str(write_shard(tmp_path / "a.tar", {}, drop=[f"{i}.json" for i in range(COUNT - 1)])))
    assert [row["json"] for row in rows] == [None] * (COUNT - 1) + ["{}"]


def test_what_has_no_row_at_all_is_one_error(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no shard")
    (tmp_path / "a.jsonl").write_bytes(b"{")
    (tmp_path / "a.json").write_bytes(b"[{]")
    (tmp_path / "a.parquet").write_bytes(b"no table")
    (tmp_path / "b.jsonl").write_bytes(b"")
    for file in ("b.jsonl", "a.tar", "a.jsonl", "a.json", "a.parquet", "none.tar"):
        with pytest.raises(GroundingFileError, match=file):
            load_rows(str(tmp_path / file))


texts = st.binary(max_size=6) | st.none()


@given(st.lists(st.lists(texts, max_size=3) | st.none(), max_size=6), st.integers(0, 3))
@settings(max_examples=50)
def test_marked_tables_hold_what_python_reads_with_replacement(lists, start):
    flat = [text for one in lists for text in one or []]
    offsets = [0]
    for one in lists:
        offsets.append(offsets[-1] + len(one or []))
    raw = pa.array(flat, pa.binary())
    strings = pa.Array.from_buffers(pa.string(), len(flat), raw.buffers())
    mask = pa.array([one is None for one in lists], pa.bool_())
    listed = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), strings, mask=mask) if lists else None
    wanted = [None if text is None else text.decode("utf-8", "replace") for text in flat]
    assert marked_table(pa.table({"a": strings.slice(start)}))["a"].to_pylist() == wanted[start:]
    if listed is not None:
        words = iter(wanted)
        wanted_lists = [None if one is None else [next(words) for _ in one] for one in lists]
        assert marked_table(pa.table({"a": listed.slice(start)}))["a"].to_pylist() == wanted_lists[start:]
