"""What comes when, and what is taken, depends on a seed and a number alone."""

from hypothesis import given
from hypothesis import strategies as st

from visual_ground.training.data.sampler import EpochSampler, happens, picker, turns


@given(st.integers(1, 50), st.integers(0, 9), st.integers(0, 9))
def test_every_epoch_has_every_row_once(length, seed, epoch):
    sampler = EpochSampler(length, seed)
    sampler.set_epoch(epoch)
    drawn = list(sampler)
    assert sorted(draw % length for draw in drawn) == list(range(length))
    assert all(draw // length == epoch for draw in drawn) and list(sampler) == drawn


@given(st.integers(0, 9), st.integers(0, 10**6))
def test_picks_are_functions_of_their_numbers(seed, draw):
    one, two = picker(seed, draw), picker(seed, draw)
    assert [one("abcd") for _ in range(5)] == [two("abcd") for _ in range(5)]
    assert happens(0.5, seed, draw) == happens(0.5, seed, draw)
    assert happens(1.0, seed, draw) and not happens(0.0, seed, draw)


def test_picks_and_events_are_spread():
    assert {picker(0, draw)("abcd") for draw in range(50)} == set("abcd")
    assert 350 < sum(happens(0.4, 3, draw) for draw in range(1000)) < 450


@given(st.integers(0, 99), st.integers(0, 99), st.integers(1, 4), st.integers(1, 4))
def test_all_combinations_of_a_rows_captions_and_images_come_once_before_any_comes_again(seed, row, captions, images):
    combinations = []
    for epoch in range(captions * images):
        choose = turns(seed, row, epoch)
        combinations.append((choose(range(captions)), choose(range(images))))
    assert len(set(combinations)) == captions * images
