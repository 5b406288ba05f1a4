import pytest
import torch
from torch.nn import functional as F

from visual_ground import GroundingError, ImageIndex
from visual_ground.index.engines.faiss_index import FaissIndex
from visual_ground.index.engines.faiss_kinds import kind_for
from visual_ground.indexing.accelerating import accelerate_index


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
    assert isinstance(again.engine, FaissIndex) and again.engine.kind == "hnsw"


def test_a_compressed_index_finds_what_it_says_and_scores_are_exact(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "visual_ground.index.engines.faiss_kinds.FEWEST_TO_LEARN", 1000
    )  # Learning from 10,000 takes long.
    vectors, queries = near_each_other(1000, 8), near_each_other(50, 8, seed=1)
    index = FaissIndex(vectors, "ivfpq")
    best, found = (queries @ vectors.T).topk(10), index.search(queries, 10)
    recall = float((found.positions[:, :, None] == best.indices[:, None]).any(-1).float().mean())
    assert index.recall >= 0.95 and recall >= 0.9
    assert torch.allclose(found.scores, (queries[:, None] * vectors[found.positions]).sum(-1), atol=1e-5)
    odd = torch.arange(1000) % 2 == 1
    assert bool((index.search(queries, 10, odd).positions % 2 == 1).all())
    index.add(queries)
    itself = index.search(queries, 1).positions[:, 0] == torch.arange(1000, 1050)
    assert len(index) == 1050 and float(itself.float().mean()) > 0.8
    index.save(tmp_path / "saved")
    again = FaissIndex.load(tmp_path / "saved")
    assert (again.kind, again.effort, again.recall) == ("ivfpq", index.effort, index.recall)
    assert torch.equal(again.search(queries, 5).positions, index.search(queries, 5).positions)
    with pytest.raises(GroundingError, match="takes no more vectors"):
        again.add(queries)
    assert len(again) == 1050


def test_a_saved_index_is_accelerated_and_its_card_says_how_much_is_found(tmp_path):
    vectors = near_each_other(300)
    ImageIndex(vectors, metadata=[{"n": i} for i in range(300)]).save_pretrained(tmp_path)
    engine = accelerate_index(tmp_path, "flat")
    card = (tmp_path / "README.md").read_text()
    assert f"a search finds {100 * engine.recall:.1f} %" in card and "(flat)" in card
    (tmp_path / "README.md").write_text(card + "Mine.")
    engine = accelerate_index(tmp_path, "hnsw")
    card = (tmp_path / "README.md").read_text()
    assert f"a search finds {100 * engine.recall:.1f} %" in card and "(hnsw)" in card and "Mine." in card
    index = ImageIndex.from_pretrained(tmp_path)
    assert isinstance(index.engine, FaissIndex) and index.engine.recall == engine.recall
    best = index.search(vectors[:5], 3, {"n": {"ge": 100}})
    assert torch.equal(best.positions, ImageIndex(vectors[100:]).search(vectors[:5], 3).positions + 100)
    index.update([7], vectors[:1])
    ImageIndex(index.vectors).save_pretrained(tmp_path)  # Without faiss: its old files are of other vectors.
    assert not isinstance(ImageIndex.from_pretrained(tmp_path).engine, FaissIndex)
    (tmp_path / "index.faiss.json").write_text("{}")
    assert len(ImageIndex.from_pretrained(tmp_path)) == 300


def test_the_kind_follows_the_size():
    assert FaissIndex(torch.eye(3)).kind == "flat"
    assert [kind_for(count) for count in (10, 10**6, 10**7)] == ["flat", "hnsw", "ivfpq"]
    for arguments in ((torch.eye(3), "tree"), (torch.full((1, 2), torch.nan),), (torch.eye(3), "ivfpq")):
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
