import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from visual_ground.errors import GroundingError
from visual_ground.index import ImageIndex


@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 40), st.integers(0, 10**6))
def test_search_equals_brute_force(n, width, k, seed):
    generator = torch.Generator().manual_seed(seed)
    vectors = F.normalize(torch.randn(n, width, generator=generator), dim=-1)
    queries = torch.randn(3, width, generator=generator)
    found = ImageIndex(vectors).search(queries, k)
    for query, scores, positions in zip(queries, found.scores, found.positions, strict=True):
        brute = sorted((float(query @ v) for v in vectors), reverse=True)[:k]
        assert torch.allclose(scores, torch.tensor(brute), atol=1e-5)
        assert torch.allclose(scores, vectors[positions] @ query, atol=1e-5)


def test_a_saved_index_finds_the_same(tmp_path):
    index = ImageIndex(
        F.normalize(torch.randn(5, 4), dim=-1), list("abcde"), [f"{c}.png" for c in "abcde"], [{"x": 1}] * 5
    )
    index.save_pretrained(tmp_path)
    again = ImageIndex.from_pretrained(tmp_path)
    query = torch.randn(2, 4)
    assert torch.equal(index.search(query, 3).positions, again.search(query, 3).positions)
    assert again.entry(2) == ("c", "c.png", {"x": 1})


def test_bad_input():
    index = ImageIndex(torch.eye(3))
    for call in (
        lambda: index.search(torch.zeros(1, 2), 1),
        lambda: index.search(torch.zeros(1, 3), 0),
        lambda: index.entry(3),
        lambda: ImageIndex(torch.eye(2), ["a", "a"]),
        lambda: ImageIndex(torch.eye(2), ["a"]),
        lambda: ImageIndex(torch.full((1, 2), torch.nan)),
        lambda: ImageIndex.from_pretrained("/nowhere"),
    ):
        with pytest.raises(GroundingError):
            call()
