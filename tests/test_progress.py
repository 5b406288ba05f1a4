"""What long work says: bars on a terminal, whole lines in a log, and nothing where nothing is to be said."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from visual_ground import progress
from visual_ground.progress import LONGEST_PAUSE_S, SHORTEST_PAUSE_S, ProgressLines, counted, progress_bar


class Endless(IterableDataset):
    def __iter__(self):
        return iter(range(3))


def test_a_log_gets_whole_lines_of_each_stage(capsys):
    assert list(counted(["a", "b"], "start values", "batches", True)) == ["a", "b"]
    assert capsys.readouterr().err == "start values: 0 of 2 batches starts\nstart values: 2 of 2 batches in 0 s\n"


@pytest.mark.parametrize("items", [(i for i in range(3)), DataLoader(Endless(), batch_size=None)], ids=["iter", "load"])
def test_work_of_unknown_length_is_counted(items, capsys):
    assert [int(item) for item in counted(items, "features", "images", True)] == [0, 1, 2]
    assert capsys.readouterr().err.splitlines() == ["features: starts", "features: 3 images in 0 s"]


def test_nothing_is_said_where_nothing_is_to_be_shown(capsys):
    assert list(counted([1], "a", "b", False)) == [1]
    with progress_bar("a", "b", 3, False) as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("is_terminal", [False, True])
def test_nothing_is_said_of_no_work(is_terminal, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    assert list(counted([], "features", "images", True)) == []
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = progress_bar("features", "images", 3, True)
    assert not isinstance(bar, ProgressLines)
    bar.close()


def test_work_that_fails_does_not_say_that_it_ended(capsys):
    with pytest.raises(ZeroDivisionError):
        for item in counted([1, 0], "a", "b", True):
            _ = 1 / item
    with pytest.raises(ZeroDivisionError), progress_bar("a", "b", 2, True) as bar:
        bar.update(1 // 0)
    assert "in 0 s" not in capsys.readouterr().err


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=60), st.booleans())
def test_lines_come_neither_too_often_nor_too_seldom(seconds, is_known):
    said, now = [], [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "monotonic", lambda: now[0])
        patch.setattr(ProgressLines, "_say", lambda self, words: said.append((now[0], words)))
        with ProgressLines("a", "b", len(seconds) if is_known else None) as bar:
            for number, took in enumerate(seconds):
                before, silent_since = now[0], said[-1][0]
                now[0] += took
                bar.update()
                if before - silent_since >= LONGEST_PAUSE_S:
                    raise AssertionError("nothing was said of the item before this one")
                if number + 1 < len(seconds) and said[-1][0] == now[0]:
                    assert now[0] - silent_since >= SHORTEST_PAUSE_S
    # In a known number of items, each tenth makes one line at most, and each long pause another.
    if is_known:
        assert len(said) <= 2 + 10 + sum(seconds) / LONGEST_PAUSE_S
