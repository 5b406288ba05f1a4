"""The processes of a launch. Those that really run side by side are tested with what they do: building an index, an
evaluation, training."""

from functools import partial
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visual_ground.errors import GroundingValueError
from visual_ground.processes import Processes


@given(st.lists(st.integers()), st.integers(1, 9))
def test_shares_are_equally_long_and_dealt_out_in_turn(batches, count):
    shares = [Processes(index, count).share(batches) for index in range(count)]
    assert len({len(share) for share in shares}) == 1
    dealt = list(chain(*zip(*shares, strict=True)))
    assert dealt[: len(batches)] == batches and len(dealt) - len(batches) < count
    assert dealt[len(batches) :] == (count * batches)[: len(dealt) - len(batches)]


def test_a_process_alone_waits_for_nobody():
    alone = Processes.launched()
    assert alone == Processes(0, 1) and alone.is_main
    assert alone.gather("a") == ["a"]
    alone.wait()
    alone.raise_together(None)
    with pytest.raises(GroundingValueError, match="mine"):
        alone.raise_together(GroundingValueError("mine"))
    assert alone.together(lambda: "mine") == ["mine"]
    with pytest.raises(GroundingValueError, match="mine"):
        alone.together(partial(alone.raise_together, GroundingValueError("mine")))
    with alone.folder(None) as folder:
        assert folder.is_dir()
    assert not folder.exists()
