"""Answers end where sentences do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import build, grounded, tokenizer
from visual_ground.generation.output import RetrievedImage
from visual_ground.generation.sentences import ELLIPSIS, GrowingSentences, cut_to_sentences, sentence_ends


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("A fox. A bus! A", ["A fox.", "A fox. A bus!"]),
        ('"A fox." It said', ['"A fox."']),
        ("It weighs 3.5 kg, e.g. when Dr. Owl", []),
        ("1. A fox", []),
        ("Here are some:\n\n- A fox runs\n- and", ["Here are some:\n\n- A fox runs"]),
        ("1. A fox runs\n2. A bus", ["1. A fox runs"]),
        ("* A fox that\n  runs\n* A bus:\n", []),
        ("The story goes that Max is a\nThe story goes that Max is a\n", []),
        ("# A fox\n\nIt has", []),
        ("- A fox.\n- A bus\n\nAnd", ["- A fox.", "- A fox.\n- A bus"]),
        ("狐狸。公", ["狐狸。"]),
    ],
)
def test_sentences_end_at_their_stops(text, sentences):
    assert [text[:end] for end in sentence_ends(text)] == sentences


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


image = st.just(RetrievedImage("x"))
words = st.text(alphabet='ab .!3-\n\u3002"', max_size=8)


@given(st.lists(image | words, max_size=12), st.booleans())
def test_sentences_that_come_out_while_an_answer_grows_are_the_answer_that_was_cut(parts, is_whole):
    growing = GrowingSentences()
    out = [part for said in parts for part in growing.add([said])]
    sure = "".join(part for part in out if isinstance(part, str))
    out += growing.end(is_whole)
    wanted = parts if is_whole else cut_to_sentences(parts)
    assert joined(out) == joined(wanted)
    whole = "".join(part for part in parts if isinstance(part, str))
    assert not sure or len(sure) in sentence_ends(whole)


def joined(parts):
    """Return the parts with neighbouring texts joined."""
    found = []
    for part in parts:
        if isinstance(part, str) and found and isinstance(found[-1], str):
            found[-1] += part
        elif part != "":
            found.append(part)
    return found


@pytest.mark.parametrize("length", range(1, 7))
def test_a_streamed_answer_ends_where_a_generated_one_does(length):
    model = grounded("llama_untied", lm=build("llama_untied"))
    options = dict(max_new_tokens=length, do_sample=False, complete_sentences=True, min_new_tokens_between_rets=0)
    for ret_bias in (-1e3, 3.0):
        plain = model.generate("w5 w6", ret_bias=-1e3, max_new_tokens=6, do_sample=False)[0].text
        for end in (None, tokenizer()(plain, add_special_tokens=False)["input_ids"][2]):
            given = {**options, "ret_bias": ret_bias, "eos_token_id": end}
            whole = model.generate("w5 w6", **given)[0]
            assert joined(model.stream("w5 w6", **given)) == joined(whole.parts)
