"""The largest singular values and their vectors, as a singular value decomposition finds them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from visual_ground.shared_space.solver import largest_singular

sizes = st.integers(1, 12)


@given(sizes, sizes, sizes, sizes, st.integers(0, 9))
def test_they_are_those_of_a_decomposition(rows, columns, rank, count, seed):
    draw = torch.Generator().manual_seed(seed)
    factors = torch.randn(rows, rank, generator=draw), torch.randn(rank, columns, generator=draw)
    matrix = (factors[0] @ factors[1]).double()
    singular, left, right = largest_singular(matrix, count)
    number = min(rows, columns, count)
    assert singular.shape == (number,) and left.shape == (number, rows) and right.shape == (number, columns)
    wanted = torch.linalg.svdvals(matrix)[:number]
    torch.testing.assert_close(singular, wanted, rtol=1e-6, atol=float(1e-6 * wanted[0]))
    found = singular > 0
    if found.any():
        torch.testing.assert_close(left[found] @ matrix, singular[found, None] * right[found])
        for vectors in (left[found], right[found]):
            torch.testing.assert_close(vectors @ vectors.T, torch.eye(len(vectors)).double(), rtol=0, atol=1e-6)
    best = singular[:, None, None] * left[:, :, None] * right[:, None]
    if number == min(rows, columns):
        torch.testing.assert_close(best.sum(0), matrix, rtol=0, atol=float(1e-6 * wanted[0]))


def test_rounding_errors_are_no_directions():
    matrix = torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 4)).double()
    assert largest_singular(matrix, 3)[0].tolist() == [pytest.approx(float(matrix.norm())), 0, 0]
