import pytest
import torch
from torch.nn import functional as F

from visual_ground import GroundingError, ImageIndex
from visual_ground.index.faiss_index import FaissIndex


def near_each_other(count, width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(30, width, generator=generator)
    return F.normalize(centres[torch.arange(count) % 30] + 0.5 * torch.randn(count, width, generator=generator), dim=-1)


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_recall_is_measured_and_scores_are_exact(kind, tmp_path):
    vectors, queries = near_each_other(3000), near_each_other(20, seed=1)
    index = FaissIndex(vectors, kind)
    assert index.kind == kind and index.recall >= 0.95
    best, found = (queries @ vectors.T).topk(10), index.search(queries, 10)
    assert float((found.positions[:, :, None] == best.indices[:, None]).any(-1).float().mean()) >= 0.9
    assert torch.allclose(found.scores, (queries[:, None] * vectors[found.positions]).sum(-1), atol=1e-5)
    index.remove(range(0, 3000, 2))
    index.add(queries)
    assert index.search(queries, 1).positions[:, 0].tolist() == list(range(3000, 3020))
    assert bool(
        (index.search(queries, 10).positions % 2 == 1).logical_or(index.search(queries, 10).positions >= 3000).all()
    )
    few = torch.zeros(3020, dtype=torch.bool)
    few[[1, 3001]] = True
    assert sorted(index.search(queries[:1], 5, few).positions[0].tolist()) == [1, 3001]
    index.save(tmp_path / "saved")
    again = FaissIndex.load(tmp_path / "saved")
    assert again.kind == kind and len(again) == 1520 and again.recall >= 0.9


def test_an_image_index_is_saved_from_behind_faiss(tmp_path):
    vectors = near_each_other(100)
    index = ImageIndex(FaissIndex(vectors, "hnsw"))
    index.remove([0])
    index.save_pretrained(tmp_path)
    again = ImageIndex.from_pretrained(tmp_path)
    assert torch.equal(again.vectors, vectors[1:]) and again.ids == list(range(1, 100))


def test_the_kind_follows_the_size():
    assert FaissIndex(torch.eye(3)).kind == "flat"
    for arguments in ((torch.eye(3), "tree"), (torch.full((1, 2), torch.nan),)):
        with pytest.raises(GroundingError):
            FaissIndex(*arguments)


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    FaissIndex(torch.eye(3)).save(tmp_path / "a")
    FaissIndex(torch.eye(4)).save(tmp_path / "b")
    (tmp_path / "a.faiss").write_bytes((tmp_path / "b.faiss").read_bytes())
    with pytest.raises(GroundingError, match="Build it again"):
        FaissIndex.load(tmp_path / "a")
    (tmp_path / "a.faiss").write_bytes(b"no index")
    with pytest.raises(GroundingError, match="Build it again"):
        FaissIndex.load(tmp_path / "a")
