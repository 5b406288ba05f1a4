"""Grounding holds for the whole model, ends for the whole model, and is undone wherever its owner is gone."""

import contextvars
import copy
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import FAMILIES, Eye, build, grounded, image_processor, picture, tokenizer
from visual_ground import GroundingConfig, ground, unground
from visual_ground.errors import GroundingStateError
from visual_ground.lm.attachment import virtual_tokens_of

IDS = torch.tensor([[5, 6, 7]])
CONFIG = GroundingConfig(retrieval_dim=6, caption_prompt="w7", image_prompt="{image}")


def width(model):
    """Return how many logits the LM has: one more where it is grounded."""
    with torch.no_grad():
        return model.lm(input_ids=IDS).logits.shape[-1]


def in_thread(call):
    """Return what a call returns in a thread that was started here."""
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


def test_disable_adapter_reaches_threads_and_generators_in_other_contexts():
    model = grounded()

    def answers():
        with model.disable_adapter():
            yield width(model)
            yield in_thread(lambda: width(model))
            yield model.generate("w4", max_new_tokens=3)[0].images

    steps = answers()
    elsewhere = [contextvars.copy_context().run(next, steps) for _ in range(3)]
    assert elsewhere == [100, 100, ()]
    assert width(model) == 100 and contextvars.copy_context().run(next, steps, None) is None
    assert width(model) == 101 and in_thread(lambda: width(model)) == 101


def test_what_only_a_grounded_lm_can_read_is_named_inside_the_block():
    for num_tokens in (100, 90):  # `[RET]` is after the LM's own ids, and one of them.
        model = grounded(num_tokens=num_tokens)
        with model.disable_adapter():
            for call, prompts in ((model.embed_text, "w4"), (model.generate, [["w4", picture(0)]])):
                with pytest.raises(GroundingStateError, match="adapter is disabled here"):
                    call(prompts)
        assert model.embed_text("w4").shape == (1, 6)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 2), max_size=8))
def test_blocks_may_overlap_and_end_in_any_order(toggles):
    model, open_blocks = MODEL, {}
    for name in toggles:
        if name in open_blocks:
            open_blocks.pop(name).__exit__(None, None, None)
        else:
            open_blocks[name] = contextvars.copy_context().run(enter, model)
        assert width(model) == (100 if open_blocks else 101)
    for block in open_blocks.values():
        block.__exit__(None, None, None)
    assert width(model) == 101


def enter(model):
    block = model.disable_adapter()
    block.__enter__()
    return block


MODEL = grounded()


def test_a_block_inside_a_call_is_of_that_call_and_of_new_ones():
    model, seen = grounded(), []

    def process(ids, scores):
        inside = scores.shape[-1]
        with model.disable_adapter():
            seen.append((inside, width(model), in_thread(lambda: width(model))))
        seen.append(width(model))
        return scores

    model.generate([["w4", picture(0)]], max_new_tokens=2, logits_processor=[process])
    assert seen == [(102, 100, 100), 102] * 2


def test_a_call_that_began_before_a_block_elsewhere_ends_as_it_began():
    model, started, go_on = grounded(), threading.Event(), threading.Event()

    def wait(ids, scores):
        started.set()
        go_on.wait(20)
        return scores

    options = dict(max_new_tokens=4, ret_bias=100.0, max_images=1, do_sample=False)
    expected = str(model.generate([["w4", picture(0)]], **options)[0])
    found = []
    thread = threading.Thread(
        target=lambda: found.append(model.generate([["w4", picture(0)]], logits_processor=[wait], **options)[0])
    )
    thread.start()
    assert started.wait(20)
    with model.disable_adapter():
        go_on.set()
        thread.join()
        assert width(model) == 100
    assert str(found[0]) == expected


@pytest.mark.parametrize("num_tokens", [100, 90], ids=["[RET] appended", "[RET] in a spare row"])
@pytest.mark.parametrize("add", [dict(special_tokens_dict={"pad_token": "[PAD]"}), ["new"], ["new", "newer"]])
def test_a_token_that_gets_the_id_of_ret_is_named(num_tokens, add):
    model = grounded(num_tokens=num_tokens, bos=False)
    model.generate("w4", max_new_tokens=1)
    added = model.tokenizer.add_special_tokens(**add) if isinstance(add, dict) else model.tokenizer.add_tokens(add)
    assert added
    for call in (lambda: model.generate("w4"), lambda: model.embed_text("w4"), lambda: model.prepare([[picture(0)]])):
        with pytest.raises(GroundingStateError, match=r"\[PAD\]|new"):
            call()
    ground(model.unground(), Eye(), model.tokenizer, image_processor, CONFIG).generate("w4", max_new_tokens=1)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("rows", [104, 96, 100], ids=["more", "fewer", "replaced"])
def test_ends_that_change_are_named_until_the_lm_is_grounded_again(family, rows):
    model = grounded(family)
    if rows == 100:
        model.lm.set_input_embeddings(copy.deepcopy(model.lm.get_input_embeddings()))
    else:
        model.lm.resize_token_embeddings(rows)
    for call in (
        lambda: model.generate("w4", max_new_tokens=1),
        lambda: model.generate([[picture(0)]], max_new_tokens=1),
        lambda: model.embed_text("w4"),
        lambda: model.log_likelihood(["w4"], ["w5"]),
        lambda: model.lm(input_ids=IDS),
    ):
        with pytest.raises(GroundingStateError, match="resized or replaced"):
            call()
    lm = model.unground()
    assert lm(input_ids=IDS).logits.shape[-1] >= rows
    ground(lm, Eye(), tokenizer(96), image_processor, CONFIG).generate("w4", max_new_tokens=1)


def hooks_of(lm):
    return [len(getattr(m, name)) for m in lm.modules() for name in ("_forward_hooks", "_forward_pre_hooks")]


def test_an_lm_whose_model_was_lost_can_be_ungrounded_or_grounded():
    for take_off in (unground, lambda lm: ground(lm, Eye(), tokenizer(), image_processor, CONFIG).unground()):
        lm = build("llama_untied").requires_grad_(True).train()
        hooks, logits = hooks_of(lm), lm(input_ids=IDS).logits
        ground(lm, Eye(), tokenizer(), image_processor, CONFIG)
        assert not any(p.requires_grad for p in lm.parameters())
        assert take_off(lm) is lm and hooks_of(lm) == hooks and virtual_tokens_of(lm) is None
        assert torch.equal(lm(input_ids=IDS).logits, logits) and lm.training
        assert all(p.requires_grad for p in lm.parameters())
    with pytest.raises(GroundingStateError, match="not grounded"):
        unground(lm)


def test_a_copy_of_a_grounded_lm_can_be_grounded_and_the_original_cannot_be_twice():
    model = grounded()
    lm = copy.deepcopy(model.lm)
    own = ground(lm, Eye(), tokenizer(), image_processor, CONFIG)
    assert width(own) == width(model) == 101
    assert sum(hooks_of(lm)) == sum(hooks_of(model.lm))
    with pytest.raises(GroundingStateError, match="already"):
        ground(model.lm, Eye(), tokenizer(), image_processor, CONFIG)
    own.unground()
    assert width(own) == 100 and width(model) == 101


def test_a_copy_of_a_grounded_model_is_one_of_its_own():
    model = grounded()
    twin = copy.deepcopy(model)
    with pytest.raises(GroundingStateError, match="already"):
        ground(twin.lm, Eye(), tokenizer(), image_processor, CONFIG)
    assert torch.equal(model.embed_text("w4 w5"), twin.embed_text("w4 w5"))
    with torch.no_grad():
        twin.adapter.ret_input.add_(1.0)
    assert not torch.equal(model.embed_text("w4 w5"), twin.embed_text("w4 w5"))
    with twin.disable_adapter():
        assert width(twin) == 100 and width(model) == 101
    twin.unground()
    assert width(twin) == 100 and width(model) == 101
