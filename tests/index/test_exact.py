import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.index.foreign import ForeignIndex, ListEngine
from tests.tiny import grounded
from visual_ground import ImageIndex
from visual_ground.errors import GroundingError, GroundingIndexError, GroundingStateError, GroundingTypeError
from visual_ground.index.base import RetrievalIndex
from visual_ground.index.engines.base import VectorIndex
from visual_ground.index.engines.exact import ExactIndex


def same(one, other):
    return one.positions.tolist() == other.positions.tolist() and torch.allclose(one.scores, other.scores, atol=1e-5)


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 10**6))
def test_added_removed_and_filtered_vectors_are_found_as_by_any_engine(n, k, seed):
    generator = torch.Generator().manual_seed(seed)
    vectors, queries = torch.randn(n, 4, generator=generator), torch.randn(3, 4, generator=generator)
    exact, plain = ExactIndex(vectors), ListEngine(vectors, 4)
    more, gone = torch.randn(5, 4, generator=generator), torch.randperm(n + 5, generator=generator)[:3].tolist()
    for engine in (exact, plain):
        engine.add(more)
        engine.remove(gone)
        assert len(engine) == n + 2 and engine.dim == 4
    mask = torch.rand(n + 5, generator=generator) < 0.5
    mask[gone] = False
    assert same(exact.search(queries, k), plain.search(queries, k))
    assert exact.search(queries, k, mask).positions.shape == (3, min(k, int(mask.sum())))
    assert same(exact.search(queries, k, mask), plain.search(queries, k, mask)) or not mask.any()


def test_the_best_come_first_also_where_all_are_wanted_and_were_added_one_by_one():
    index = ExactIndex(torch.tensor([[0.1]]))
    for value in (0.3, 0.2, 0.4):
        index.add(torch.tensor([[value]]))
    for k in range(1, 6):
        assert index.search(torch.ones(1, 1), k).positions.tolist() == [[3, 1, 2, 0][:k]]


def test_bad_input_changes_nothing(tmp_path):
    index = ExactIndex(torch.eye(3))
    for call, error in (
        (lambda: index.add(torch.zeros(1, 2)), ValueError),
        (lambda: index.add(torch.full((1, 3), torch.inf)), ValueError),
        (lambda: index.remove([0, 3]), GroundingIndexError),
        (lambda: index.remove([-1]), GroundingIndexError),
        (lambda: index.search(torch.zeros(1, 3), 1, torch.ones(3)), ValueError),
        (lambda: index.search(torch.zeros(1, 3), 1, torch.ones(2, dtype=torch.bool)), ValueError),
        (lambda: ExactIndex.load(tmp_path / "none"), OSError),
    ):
        with pytest.raises(error) as caught:
            call()
        assert isinstance(caught.value, GroundingError)
    assert torch.equal(index.vectors, torch.eye(3))
    index.save(tmp_path / "saved")
    assert torch.equal(ExactIndex.load(tmp_path / "saved").vectors, index.vectors)


def test_any_engine_can_carry_an_image_index():
    vectors = torch.nn.functional.normalize(torch.randn(6, 4), dim=-1)
    engine = ListEngine(vectors, 4)
    assert isinstance(engine, VectorIndex) and isinstance(ExactIndex(vectors), VectorIndex)
    foreign, own = ImageIndex(engine, list("abcdef")), ImageIndex(vectors, list("abcdef"))
    mask = torch.tensor([True, False] * 3)
    assert len(foreign) == 6 and foreign.dim == 4 and foreign.entry(2)[0] == "c"
    assert same(foreign.search(vectors, 3), own.search(vectors, 3))
    assert same(foreign.search(vectors, 3, mask), own.search(vectors, 3, mask))
    for call in (lambda: foreign.vectors, lambda: foreign.save_pretrained("nowhere")):
        with pytest.raises(GroundingStateError, match="ListEngine"):
            call()
    with pytest.raises(GroundingTypeError, match="VectorIndex"):
        ImageIndex([[1.0, 0.0]])


def test_generate_searches_any_index_and_refuses_what_is_none():
    model = grounded("llama_untied").eval()
    width = model.config.retrieval_dim
    vectors = torch.nn.functional.normalize(torch.randn(5, width), dim=-1)
    foreign = ForeignIndex(ListEngine(vectors, width))
    assert isinstance(foreign, RetrievalIndex) and isinstance(ImageIndex(vectors), RetrievalIndex)
    options = {"max_new_tokens": 4, "ret_bias": 100.0, "do_sample": False}
    answers = [model.generate(["w4 w5"], index, **options)[0] for index in (foreign, ImageIndex(vectors))]
    assert answers[0].images and [image.metadata["row"] for image in answers[0].images] == [
        image.id for image in answers[1].images
    ]
    with pytest.raises(GroundingError, match="width"):
        model.generate(["w4"], ForeignIndex(ListEngine(torch.zeros(1, width + 1), width + 1)))
    with pytest.raises(GroundingTypeError, match="got ListEngine"):
        model.generate(["w4"], ListEngine(vectors, width))
