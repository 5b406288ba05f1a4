"""A streamed answer is the answer of `generate`, and costs no second pass over what was said."""

import threading

import pytest
import torch
from transformers import GenerationConfig

from tests.tiny import FAMILIES, grounded, picture
from visual_ground import GroundingError, ImageIndex, RetrievedImage
from visual_ground.generation import generate as generation
from visual_ground.generation.branches import BranchReader
from visual_ground.generation.growing import GrowingText

PROMPT = [["w4 w5", picture(0), "w6"]]
GREEDY = dict(do_sample=False, max_new_tokens=8, min_new_tokens=8)
# Words and pictures by turns.
MIXED = dict(ret_bias=1e3, min_new_tokens_before_ret=1, min_new_tokens_between_rets=2)


def make_index(model):
    vectors = torch.nn.functional.normalize(torch.randn(9, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    return ImageIndex(vectors, [f"p{i}" for i in range(9)])


def joined(parts):
    """Return parts with texts in a row made one, and scores rounded."""
    out = []
    for part in parts:
        if isinstance(part, str):
            out += [out.pop() + part] if out and isinstance(out[-1], str) else [part]
        else:
            out.append((part.id, None if part.score is None else round(part.score, 3)))
    return out


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("images_per_ret", [1, 2])
def test_a_streamed_answer_is_that_of_generate(family, images_per_ret):
    model = grounded(family)
    index = make_index(model)
    options = dict(GREEDY, **MIXED, images_per_ret=images_per_ret)
    whole = model.generate(PROMPT, index, **options)[0]
    assert whole.images and whole.text
    assert joined(model.stream(PROMPT, index, **options)) == joined(whole.parts)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers, prompt", [((-1,), ""), ((1, -1), ""), ((-1,), "w40 w41")])
def test_vectors_read_while_generating_are_those_of_a_second_run(family, layers, prompt, monkeypatch):
    model = grounded(family, text_layers=layers, retrieval_prompt=prompt)
    # The first two prompts open a turn, after which what was asked is read as well.
    monkeypatch.setattr(type(model.processor), "opens_turn", lambda self, ids: ids[-1] in (6, 9))
    prompts = [*PROMPT, "w9", "w4 w5 w6 w7 w8 w9 w10"]
    options = dict(GREEDY, **MIXED, num_return_sequences=2)
    options["do_sample"] = True
    scores = []
    for heard in (True, False):
        if not heard:
            monkeypatch.setattr(generation.AnswerListener, "vectors_of", lambda self, sequences: None)
        torch.manual_seed(0)
        scores.append([joined(answer.parts) for answer in model.generate(prompts, make_index(model), **options)])
    assert scores[0] == scores[1]


@torch.no_grad()
@pytest.mark.parametrize("prompt", ["", "w40 w41"])
@pytest.mark.parametrize("family", ["llama_untied", "gpt2"])
def test_nothing_is_run_twice_and_a_picture_takes_no_run_of_its_own(family, prompt, monkeypatch):
    model = grounded(family, retrieval_prompt=prompt)
    index, options = make_index(model), {**GREEDY, **MIXED, "max_new_tokens": 7, "min_new_tokens": 7}
    model.generate(PROMPT, index, **options)  # Finds out that this LM reads several places together.
    monkeypatch.setattr(generation, "ret_vectors", None)
    read, written = [], []
    hooks = [
        model.lm.get_input_embeddings().register_forward_hook(lambda m, a, out: read.append(out.shape[1])),
        model.lm.get_output_embeddings().register_forward_hook(lambda m, a, out: written.append(out.shape[1])),
    ]
    answer = model.generate(PROMPT, index, **options)[0]
    for hook in hooks:
        hook.remove()
    pictures, words = len(answer.images), len(prompt.split())
    assert len(read) == 7 and sorted(read[1:]) == [1] * (6 - pictures) + [1 + words] * pictures and pictures == 2
    assert written[1:] == [1] * 6, "no logits are computed for what is read besides"


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers, prompt", [((-1,), ""), ((1, -1), ""), ((-1,), "w40 w41")])
@pytest.mark.parametrize("count", [7, 8])
def test_a_picture_that_a_step_reads_is_the_one_that_is_read_alone(family, layers, prompt, count, monkeypatch):
    """Also where an answer's last token asks for it, as one of the two lengths does, and no step follows."""
    model = grounded(family, text_layers=layers, retrieval_prompt=prompt)
    monkeypatch.setattr(type(model.processor), "opens_turn", lambda self, ids: ids[-1] == 6)
    options = {**MIXED, "do_sample": False, "max_new_tokens": count, "min_new_tokens": count}
    index = make_index(model)
    found = [joined(model.stream(PROMPT, index, **options)) for _ in range(2)]
    found.append(joined(model.generate(PROMPT, index, **options)[0].parts))
    more = {"output_hidden_states": True, "return_dict_in_generate": True}
    found.append(joined(model.generate(PROMPT, index, **options, **more)[0].parts))
    monkeypatch.setattr(BranchReader, "join", lambda self, branches, token: None)
    expected = joined(model.stream(PROMPT, index, **options))
    assert [one for one in found if one != expected] == [] and any(isinstance(part, tuple) for part in expected)


def test_a_picture_comes_before_the_words_after_it():
    model = grounded()
    parts = model.stream(PROMPT, make_index(model), ret_bias=1e4, max_images=1, max_new_tokens=8, min_new_tokens=8)
    first = next(parts)
    assert isinstance(first, RetrievedImage)
    assert all(isinstance(part, str) for part in parts)


def test_a_stream_that_is_left_ends_its_thread():
    model = grounded()
    before = threading.active_count()
    parts = model.stream(PROMPT, max_new_tokens=10**6, suppress_tokens=[2], max_images=0)
    next(parts)
    parts.close()
    assert threading.active_count() == before


@pytest.mark.parametrize(
    "prompts, options, words",
    [
        (["w4", "w5"], {}, "2 prompts"),
        ("w4", dict(num_beams=2), "beam search"),
        ("w4", dict(num_return_sequences=2, do_sample=True), "one answer"),
        ("w4", dict(generation_config=GenerationConfig(num_return_sequences=2, do_sample=True)), "2 answers each"),
        ("w4", dict(temperature="hot", do_sample=True), "hot"),
        ("w4", dict(index=3), "ImageIndex"),
    ],
)
def test_what_cannot_be_streamed_is_said(prompts, options, words):
    with pytest.raises((GroundingError, ValueError, TypeError), match=words):
        list(grounded().stream(prompts, **options))


def test_a_character_in_several_tokens_comes_whole():
    class Bytes:
        def decode(self, ids, **options):
            return bytes(ids).decode(errors="replace")

    text = GrowingText(Bytes())
    assert [text.add(byte) for byte in "é!🙂".encode()] == ["", "é", "!", "", "", "", "🙂"]
    assert [text.add(0xC3), text.flush(), text.flush()] == ["", "\ufffd", ""]
