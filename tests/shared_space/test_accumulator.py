"""The space from a stream is the one from all rows at once, and bad pairs are named."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from visual_ground import GroundingError
from visual_ground.shared_space.accumulator import DEFAULT, MomentAccumulator
from visual_ground.shared_space.solver import Penalties


def pairs_of(count, a=12, f=20, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randn(shape, generator=generator)

    hidden = numbers(count, 5)
    return hidden @ numbers(5, a) + 0.3 * numbers(count, a) + 50, hidden @ numbers(5, f) + 0.3 * numbers(count, f) - 3


def streamed(texts, images, part, groups=None):
    groups, found = range(len(texts)) if groups is None else groups, MomentAccumulator()
    for i in range(0, len(texts), part):
        found.add(texts[i : i + part], images[i : i + part], groups[i : i + part])
    return found


def cosines(space, texts, images):
    return normalize(space.text(texts), dim=-1) @ normalize(space.image(images), dim=-1).T


def direct(texts, images, width, penalties):
    """Return the cosines by the rows' own singular values, in float64."""
    whitened = []
    for rows, penalty in ((texts.double(), penalties.text), (images.double(), penalties.image)):
        rows = (rows - rows.mean(0)) / rows.std(0, correction=0)
        covariance = rows.T @ rows / len(rows)
        values, vectors = torch.linalg.eigh(
            covariance + penalty * covariance.diagonal().mean() * torch.eye(rows.shape[1])
        )
        whitened.append(rows @ vectors @ torch.diag(values.rsqrt()) @ vectors.T)
    u, s, v = torch.linalg.svd(whitened[0].T @ whitened[1] / len(texts), full_matrices=False)
    root = s[:width].sqrt()
    return normalize(whitened[0] @ u[:, :width] * root, dim=-1) @ normalize(whitened[1] @ v[:width].T * root, dim=-1).T


@settings(max_examples=15)
@given(
    count=st.integers(3, 60),
    part=st.integers(1, 60),
    a=st.integers(2, 14),
    f=st.integers(2, 14),
    text=st.sampled_from([0.3, 3.0]),
)
def test_a_stream_gives_what_all_rows_give_at_once(count, part, a, f, text):
    texts, images = pairs_of(count, a, f)
    penalties, width = Penalties(text, 1.0), min(a, f)
    found = streamed(texts, images, part).solve(width, [penalties])
    assert torch.allclose(cosines(found, texts, images).double(), direct(texts, images, width, penalties), atol=2e-4)


def test_the_order_of_the_pairs_changes_nothing():
    texts, images = pairs_of(300)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    one = streamed(texts, images, 64).solve(8)
    other = streamed(texts[order], images[order], 50, order.tolist()).solve(8)
    assert one.penalties == other.penalties
    assert torch.allclose(cosines(one, texts, images), cosines(other, texts, images), atol=1e-4)


def test_memory_does_not_grow_with_the_pairs():
    texts, images = pairs_of(3000, 4, 6)

    def held(found):
        moments = sum(t.nbytes for fold in found._folds for t in vars(fold).values() if isinstance(t, torch.Tensor))
        return moments, sum(len(sample) for sample in found._samples)

    assert held(streamed(texts[:1500], images[:1500], 100)) == held(streamed(texts, images, 100))


def test_held_out_pairs_find_each_other_and_missing_dimensions_are_zero():
    texts, images = pairs_of(400, 6, 20)
    found = streamed(texts[:300], images[:300], 100).solve(8)
    assert not found.text.weight[6:].any() and not found.image.weight[6:].any()
    right = cosines(found, texts[300:], images[300:]).argmax(1) == torch.arange(100)
    assert float(right.float().mean()) > 0.4


def test_a_group_is_in_one_fold_however_often_it_comes():
    texts, images = pairs_of(80)
    found = streamed(texts, images, 7, ["same", "other"] * 40)
    assert sorted(fold.count for fold in found._folds)[-2:] in ([40, 40], [0, 80])


def test_other_penalties_are_taken_only_where_they_are_clearly_better():
    generator = torch.Generator().manual_seed(0)
    unrelated = [torch.randn(400, 8, generator=generator) for _ in range(2)]
    assert streamed(*unrelated, 100).solve(4).penalties == DEFAULT
    # Texts tell their images by what varies least in them, which large penalties drown.
    hidden, scale = torch.randn(400, 6, generator=generator), torch.tensor([30.0] * 6 + [1.0] * 6)
    mixed = torch.linalg.qr(torch.randn(12, 12, generator=generator))[0]
    texts = (torch.cat([torch.randn(400, 6, generator=generator), hidden], 1) * scale) @ mixed
    candidates = [DEFAULT, Penalties(1e-4, 1e-4)]
    assert streamed(texts, hidden, 100).solve(6, candidates).penalties == candidates[1]


def test_few_pairs_take_the_usual_penalties_and_say_so(caplog):
    assert streamed(*pairs_of(9), 9).solve(4).penalties == DEFAULT
    assert "9 pairs are too few to choose penalties by" in caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, x, g: (t, x, [1] * len(g)), "20 pairs, of 1 different groups"),
        (lambda t, x, g: (t, torch.ones_like(x), g), "All images have the same features"),
        (lambda t, x, g: (torch.ones_like(t), x, g), "All texts have the same features"),
        (lambda t, x, g: (t, x.index_fill(0, torch.tensor([3]), torch.nan), g), "the first is number 3"),
    ],
    ids=["one group", "constant images", "constant texts", "NaN"],
)
def test_what_cannot_be_fitted_is_named(change, words):
    texts, images, groups = change(*pairs_of(20), list(range(20)))
    with pytest.raises(GroundingError, match=words):
        streamed(texts, images, 20, groups).solve(4)
    with pytest.raises(GroundingError, match="0 pairs"):
        MomentAccumulator().solve(4)


def test_texts_are_fitted_to_images_that_stay_where_they_are():
    generator = torch.Generator().manual_seed(0)
    texts, map_ = torch.randn(400, 6, generator=generator), torch.randn(6, 9, generator=generator)
    # What all images have in common, and numbers that say nothing.
    images = torch.nn.functional.normalize(torch.cat([texts @ map_, torch.zeros(400, 1)], 1) + 3.0, dim=-1)
    pairs = MomentAccumulator(fixed_images=True)
    pairs.add(texts, images, range(400))
    space = pairs.solve(10)
    assert torch.equal(space.image(images), images)
    cosines = torch.nn.functional.normalize(space.text(texts), dim=-1) @ images.T
    assert float((cosines.argmax(1) == torch.arange(400)).float().mean()) > 0.5
