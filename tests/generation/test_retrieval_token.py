import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from visual_ground.generation.retrieval_token import (
    RetLogitsProcessor,
    RetrievalSettings,
    Shown,
    retrieve,
    split_at_ret,
)
from visual_ground.index.image_index import ImageIndex

RET = 9


class Letters:
    def decode(self, ids, **kwargs):
        return "".join("abcdefgh"[i] for i in ids)


def test_text_after_the_last_image_is_kept():
    assert split_at_ret([0, RET, 1, 2, RET, RET, 3], RET, Letters()) == ["a", None, "bc", None, None, "d"]
    assert split_at_ret([RET], RET, Letters()) == [None]


def test_processor_bias_minimum_and_maximum():
    settings = RetrievalSettings(ret_bias=2.0, min_new_tokens_before_ret=1, max_images=1)
    process = RetLogitsProcessor(RET, 2, settings)
    start, later, done = torch.zeros(1, 2), torch.zeros(1, 3), torch.tensor([[0, 0, RET, 1]])
    values = [float(process(ids.long(), torch.ones(1, 10))[0, RET]) for ids in (start, later, done)]
    assert values == [float("-inf"), 3.0, float("-inf")]
    apart = RetLogitsProcessor(RET, 2, RetrievalSettings(min_new_tokens_between_rets=2))
    near, far = torch.tensor([[0, 0, RET, 1]]), torch.tensor([[0, 0, RET, 1, 1]])
    assert [float(apart(ids, torch.ones(1, 10))[0, RET]) for ids in (near, far)] == [float("-inf"), 1.0]


@given(st.lists(st.booleans(), max_size=60), st.integers(0, 12), st.none() | st.integers(0, 6))
def test_however_much_ret_is_wanted_the_gap_and_the_maximum_hold(words, gap, most):
    """An LM that wants nothing but `[RET]`, and words where it may not have it or where `words` says so."""
    settings = RetrievalSettings(ret_bias=1e6, min_new_tokens_between_rets=gap, max_images=most)
    process, ids = RetLogitsProcessor(RET, 1, settings), torch.zeros(1, 1, dtype=torch.long)
    for word in words:
        scores = process(ids, torch.zeros(1, 10))
        scores[0, RET] -= 2e6 * word
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=-1)
    places = (ids[0] == RET).nonzero()[:, 0].tolist()
    assert most is None or len(places) <= most
    assert all(later - earlier > gap for earlier, later in itertools.pairwise(places))
    if not any(words):
        wanted = -(-len(words) // (gap + 1))
        assert len(places) == (wanted if most is None else min(most, wanted))


def test_only_after_sentences_means_right_behind_their_ends():
    text = ["It", " is", " 3.", "5", " miles", ".", " Tall", "!", " It"]
    settings = RetrievalSettings(ret_bias=1e6, only_after_sentences=True, min_new_tokens_between_rets=0)
    process = RetLogitsProcessor(RET, 1, settings, decode=lambda ids: "".join(text[i] for i in ids))
    rows = [[0, *range(n)] for n in range(len(text) + 1)]
    allowed = [n for n, row in enumerate(rows) if process(torch.tensor([row]), torch.zeros(1, 10))[0, RET] > 0]
    assert allowed == [6, 8]
    assert process(torch.tensor([[0, 0, 1, RET, 5]]), torch.zeros(1, 10))[0, RET] > 0, "a picture is no word"


def test_by_default_an_answer_has_a_few_images_with_words_between_them():
    settings = RetrievalSettings()
    assert settings.min_new_tokens_between_rets > 0 and 1 < settings.max_images < 10 and not settings.allow_repeats


def test_no_image_twice_unless_asked_and_small_indexes_give_what_they_have():
    index, states = ImageIndex(torch.eye(3), list("abc")), torch.tensor([[1.0, 0.5, 0.0]] * 3)
    ids = lambda settings: [[i.id for i in images] for images in retrieve(states, index, settings)]  # noqa: E731
    assert ids(RetrievalSettings()) == [["a"], ["b"], ["c"]]
    assert ids(RetrievalSettings(images_per_ret=2)) == [["a", "b"], ["c"], []]
    assert ids(RetrievalSettings(allow_repeats=True)) == [["a"], ["a"], ["a"]]
    assert ids(RetrievalSettings(filter={"id": ["b", "c"]})) == [["b"], ["c"], []]
    assert retrieve(states, None, RetrievalSettings())[0][0].id is None


@given(st.integers(1, 4), st.none() | st.integers(0, 9), st.booleans())
def test_max_images_counts_images_at_once_and_one_ret_after_another(images_per_ret, most, allow_repeats):
    settings = RetrievalSettings(images_per_ret=images_per_ret, max_images=most, allow_repeats=allow_repeats)
    index, shown = ImageIndex(torch.eye(40)), Shown()
    states = torch.rand(3 if settings.max_rets is None else settings.max_rets, 40)
    together = [[image.id for image in images] for images in retrieve(states, index, settings)]
    one_by_one = [[image.id for image in retrieve(state[None], index, settings, shown)[0]] for state in states]
    assert together == one_by_one and all(together), "no [RET] without an image"
    counts = [len(images) for images in together]
    assert sum(counts) == (3 * images_per_ret if most is None else most)
    assert all(count == images_per_ret for count in counts[:-1])


@given(st.integers(0, 99), st.integers(1, 3))
def test_if_no_picture_can_be_opened_an_answer_shows_those_that_it_would_show(seed, images_per_ret):
    torch.manual_seed(seed)
    vectors, asked = torch.randn(20, 4), torch.randn(3, 4)
    gone = ImageIndex(vectors, images=[f"/nowhere/{i}.png" for i in range(20)])
    settings = RetrievalSettings(images_per_ret=images_per_ret, max_images=None)
    there, lost = (retrieve(asked, index, settings) for index in (ImageIndex(vectors), gone))
    assert [[image.id for image in part] for part in lost] == [[image.id for image in part] for part in there]
