"""Answers end where sentences do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import build, grounded, tokenizer
from visual_ground.generation.output import RetrievedImage
from visual_ground.generation.sentences import ELLIPSIS, cut_to_sentences, sentence_ends


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("A fox. A bus! A", ["A fox.", "A fox. A bus!"]),
        ('"A fox." It said', ['"A fox."']),
        ("It weighs 3.5 kg, e.g. when Dr. Owl", []),
        ("1. A fox", []),
        ("Here are some:\n\nA fox runs\nand", ["Here are some:\n\nA fox runs"]),
        ("狐狸。公", ["狐狸。"]),
    ],
)
def test_sentences_end_at_their_stops(text, sentences):
    assert [text[:end] for end in sentence_ends(text)] == sentences


@settings(deadline=None)
@given(st.lists(st.one_of(st.just(RetrievedImage("x")), st.text(alphabet="ab .!\n", max_size=12)), max_size=6))
def test_a_cut_answer_is_the_beginning_of_the_answer_and_ends_at_a_sentence_or_an_ellipsis(parts):
    cut = cut_to_sentences(parts)
    text, whole = ("".join(p for p in some if isinstance(p, str)) for some in (cut, parts))
    assert whole.startswith(text.removesuffix(ELLIPSIS))
    assert not text.strip() or text.endswith(ELLIPSIS) or len(text) in sentence_ends(whole)
    assert sum(isinstance(p, RetrievedImage) for p in cut) <= sum(isinstance(p, RetrievedImage) for p in parts)


def test_a_picture_behind_the_last_whole_sentence_stays_and_later_ones_go():
    one, two = RetrievedImage("one"), RetrievedImage("two")
    assert cut_to_sentences(["A fox.", one, " A bus is", two]) == ("A fox.", one)


def test_only_answers_that_ran_out_of_tokens_are_cut():
    model = grounded("llama_untied", lm=build("llama_untied"))
    options = {"max_new_tokens": 5, "max_images": 0, "do_sample": False}
    plain, cut = (model.generate("w5 w6", complete_sentences=one, **options)[0] for one in (False, True))
    words = plain.text.split(" ")
    assert cut.text == " ".join(words[:-1]) + ELLIPSIS
    # Its second id as the end: what comes before it is the LM's own whole answer.
    end = tokenizer()(plain.text, add_special_tokens=False)["input_ids"][1]
    assert ELLIPSIS not in model.generate("w5 w6", complete_sentences=True, eos_token_id=end, **options)[0].text
    ends = torch.tensor([end])
    assert ELLIPSIS not in model.generate("w5 w6", complete_sentences=True, eos_token_id=ends, **options)[0].text
