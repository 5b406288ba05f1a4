import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from visual_ground import GroundingError, ImageIndex
from visual_ground.index.remote_images import ImageLink
from visual_ground.indexing.foreign import read_embeddings
from visual_ground.vision.identity import ImageSpace


def clip_retrieval(folder, width=4):
    """A folder as clip-retrieval writes it: two shards of float16 that are not of unit length."""
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    vectors = np.random.default_rng(0).normal(size=(5, width)).astype(np.float16)
    for shard, rows in enumerate((vectors[:3], vectors[3:])):
        np.save(folder / "img_emb" / f"img_emb_{shard}.npy", rows)
        names = [f"http://a.org/{shard}/{i}.jpg" for i in range(len(rows))]
        table = {"url": names, "caption": ["a cat"] * len(rows), "similarity": [0.5, float("nan"), 0.1][: len(rows)]}
        pq.write_table(pa.table(table), folder / "metadata" / f"metadata_{shard}.parquet")
    return torch.from_numpy(vectors).float()


def test_a_folder_of_clip_retrieval_becomes_an_index(tmp_path):
    vectors = clip_retrieval(tmp_path)
    index = read_embeddings(tmp_path)
    assert index.ids == [0, 1, 2, 3, 4] and index.vectors.dtype == torch.float16
    assert torch.allclose(index.vectors.float(), torch.nn.functional.normalize(vectors, dim=-1), atol=1e-3)
    assert index.entry(3) == (3, ImageLink("http://a.org/1/0.jpg"), {"caption": "a cat", "similarity": 0.5})
    assert index.metadata[1] == {"caption": "a cat"}  # NaN is no value.
    index.save_pretrained(tmp_path / "saved")


def test_an_array_and_a_table_become_an_index(tmp_path):
    np.save(tmp_path / "a.npy", np.eye(3, dtype=np.float32) * 2)
    pq.write_table(pa.table({"id": ["a", "b", "c"], "n": [1, 2, None]}), tmp_path / "a.parquet")
    index = read_embeddings(tmp_path / "a.npy", tmp_path / "a.parquet", dim=3)
    assert index.ids == list("abc") and index.metadata == [{"n": 1}, {"n": 2}, {}]
    assert torch.equal(index.vectors, torch.eye(3))
    assert read_embeddings(tmp_path / "a.npy").ids == [0, 1, 2]


def test_embeddings_for_a_model_are_checked_with_it_and_refused_by_others(tmp_path):
    clip_retrieval(tmp_path, width=6)
    ours, theirs = (ImageSpace.of(torch.eye(6)[rows], "openai/clip", "me/adapter") for rows in ([0, 1], [2, 3]))
    index = read_embeddings(tmp_path, space=ours)
    index.check_model(ours)
    index.save_pretrained(tmp_path / "saved")
    with pytest.raises(GroundingError, match="was built with 'me/adapter' with 'openai/clip'"):
        ImageIndex.from_pretrained(tmp_path / "saved").check_model(theirs)
    with pytest.raises(
        GroundingError, match=r"\(3, 6\); expected .* \(n, 5\), as 'me/adapter' with 'openai/clip' makes"
    ):
        read_embeddings(tmp_path, space=ImageSpace.of(torch.eye(5)[:2], "openai/clip", "me/adapter"))


def test_what_does_not_fit_is_named(tmp_path):
    clip_retrieval(tmp_path / "clip")
    np.save(tmp_path / "flat.npy", np.ones(3))
    np.save(tmp_path / "words.npy", np.array(["a"]))
    np.save(tmp_path / "nan.npy", np.full((2, 3), np.nan))
    np.save(tmp_path / "short.npy", np.eye(2))
    pq.write_table(pa.table({"id": [1, 2, 3]}), tmp_path / "long.parquet")
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY")
    for arguments, words in (
        ((tmp_path / "clip", None, 8), "shape"),
        ((tmp_path / "flat.npy",), "shape"),
        ((tmp_path / "words.npy",), "expected floats"),
        ((tmp_path / "nan.npy",), "finite"),
        ((tmp_path / "broken.npy",), "cannot be read"),
        ((tmp_path / "none.npy",), "cannot be read"),
        ((tmp_path / "short.npy", tmp_path / "long.parquet"), "3 rows"),
        ((tmp_path / "short.npy", tmp_path / "short.npy"), "cannot be read"),
        ((tmp_path / "clip" / "metadata",), "no embeddings"),
    ):
        with pytest.raises(GroundingError, match=words):
            read_embeddings(*arguments)
