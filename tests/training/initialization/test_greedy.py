"""Greedy answers in batches are those of each prompt alone, and what was read on the way is what is read again."""

import dataclasses

import pytest
import torch

from tests.tiny import FAMILIES, Eye, build, image_processor, tokenizer
from visual_ground import GroundingConfig, ground
from visual_ground.training.initialization import answers, greedy
from visual_ground.training.initialization.greedy import Answer, greedy_answers
from visual_ground.training.initialization.ret_input import own_logits
from visual_ground.training.speedups import beginnings

PROMPTS = [(1, 20, 21, 22, 30), (1, 20, 21, 22, 31, 32, 33, 34, 35, 36, 37), (1, 20, 21, 22, 40, 41, 42)]


def starts(prompts):
    return [Answer(prompt, (), False, True) for prompt in prompts]


def grounded(family):
    config = GroundingConfig(retrieval_dim=6, caption_prompt="w7", image_prompt="w7 {image}")
    return ground(build(family), Eye(), tokenizer(), image_processor, config).eval()


@pytest.mark.parametrize("at_once", [beginnings.READ_AT_ONCE, 11], ids=["together", "one_by_one"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_batch_answers_as_each_prompt_alone(family, at_once, monkeypatch):
    monkeypatch.setattr(beginnings, "READ_AT_ONCE", at_once)
    model = grounded(family)
    together = greedy_answers(model, starts(PROMPTS), 10)
    for prompt, answer in zip(PROMPTS, together, strict=True):
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": 10, "do_sample": False, "suppress_tokens": [model.ret_token_id]}
        alone = model.lm.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert answer.prompt == prompt and answer.ids == tuple(i for i in alone[0, len(prompt) :].tolist() if i != 2)
        first = len(prompt) - 1
        places = range(first, first + answer.num_places)
        whole = torch.tensor([[*prompt, *answer.ids]])
        states = model.frozen_lm.hidden_states(whole, torch.ones_like(whole), torch.tensor(places))[0]
        assert torch.allclose(answer.states, states, atol=1e-4, rtol=1e-3)
        normaliser = own_logits(model, states).logsumexp(-1)
        if "capped" not in family:  # Read again, the head alone caps nothing.
            assert torch.allclose(answer.log_normaliser, normaliser, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("prompts", [PROMPTS, [(5, 6), (7, 8, 9)], [(1, 5)] * 3])
def test_answers_stop_where_they_are_long_enough(prompts):
    model = grounded("llama_untied")
    whole = greedy_answers(model, starts(prompts), 10)
    short = greedy_answers(model, starts(prompts), 10, lambda answer: 3 if len(answer.prompt) < 6 else None)
    for one, other in zip(short, whole, strict=True):
        assert one.ids == (other.ids[:3] if len(one.prompt) < 6 else other.ids)
        assert len(one.states) == one.num_places == len(one.log_normaliser)


@pytest.mark.parametrize(("at_once", "expected"), [(33, [4, 3 * 6, 3]), (11, [4, 1, 6, 2, 3])])
def test_what_all_prompts_begin_with_is_read_once(at_once, expected, monkeypatch):
    monkeypatch.setattr(beginnings, "READ_AT_ONCE", at_once)
    model, read = grounded("llama_untied"), []
    model.lm.get_input_embeddings().register_forward_hook(lambda module, args, output: read.append(args[0].numel()))
    greedy_answers(model, starts(PROMPTS), 1)
    # The four shared ids; what follows them, padded to the longest of a part and without the last; then the last.
    assert read == expected


@pytest.mark.parametrize("at_once", [1024, 11])
@torch.no_grad()
def test_each_prompt_reads_its_own_pictures(at_once, monkeypatch):
    monkeypatch.setattr(beginnings, "READ_AT_ONCE", at_once)
    model = grounded("llama_untied")
    rows = 3 * torch.randn(3, model.adapter.embedding_mean.numel(), generator=torch.Generator().manual_seed(0))
    prompts = [((1, 20, -1, 30), rows[:1]), ((1, 20, 31, 32, 33), rows[:0]), ((1, 20, -1, 21, 22, -2, 30), rows[1:])]
    asked = [Answer(ids, (), False, True, list(own.split(1)) if len(own) else ()) for ids, own in prompts]
    for start, answer in zip(asked, greedy_answers(model, asked, 8), strict=True):
        alone = greedy_answers(model, [start], 8)[0]
        assert answer.ids == alone.ids
        torch.testing.assert_close(answer.states, alone.states, atol=1e-4, rtol=1e-3)
    changed = greedy_answers(model, [*asked[:2], dataclasses.replace(asked[2], image_tokens=(-rows[1:2], rows[2:]))], 8)
    assert not torch.allclose(changed[2].states[0], answer.states[0], atol=1e-3)


def test_an_answer_is_cut_with_what_was_read():
    answer = greedy.Answer((1,), (5, 6, 7), True, False, torch.zeros(4, 2), torch.zeros(4))
    assert answer.cut(3) is answer
    assert answer.cut(2).ids == (5, 6) and len(answer.cut(2).states) == 2 and not answer.cut(2).ended


def test_batches_are_smaller_where_an_lm_keeps_more(monkeypatch):
    sizes = []
    for room in (1, 2**16, 2**31):
        monkeypatch.setattr(answers, "BATCH_BYTES", room)
        sizes.append(answers._batch_size(grounded("llama_untied"), 20))
    assert 1 == sizes[0] < sizes[1] < sizes[2] == answers.BATCH_SIZE
    assert answers._batch_size(grounded("mamba"), 20) == answers.BATCH_SIZE  # Keeps nothing of each position.
