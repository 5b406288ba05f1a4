"""`[RET]` is said where pictures belong in the LM's own answers, and nowhere else; the text stays the LM's."""

from itertools import takewhile
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.tiny import FAMILIES, Eye, build, image_processor, tokenizer
from tests.training.runs import ROWS, arguments
from visual_ground import GroundingConfig, GroundingTrainer, ground
from visual_ground.training.initialization import answers, dialogues, emission, ret_input, turns
from visual_ground.training.initialization.answers import answers_to, place_of_picture
from visual_ground.training.initialization.dialogues import Shown, later_turns, others_about, requests_of
from visual_ground.training.initialization.greedy import Answer
from visual_ground.training.initialization.ret_token import Places, fit_gate, fit_output_embedding
from visual_ground.training.initialization.wordings import OTHERS

TEMPLATE = "{% for m in messages %}{{ m['content'] }} w9 {% endfor %}"
CAPTIONS = [f"w{20 + i}" for i in range(12)]
FEATURES = {caption: torch.eye(12)[i] for i, caption in enumerate(CAPTIONS)}


def grounded(family="llama_untied", template=TEMPLATE, **config):
    settings = GroundingConfig(retrieval_dim=6, caption_prompt="w7", image_prompt="w7 {image}", **config)
    return ground(build(family), Eye(), tokenizer(template=template), image_processor, settings).eval()


def fit_ret(model, folder=None, features=None):
    begun = emission.fit_ret_input(model, CAPTIONS, folder=folder)
    emission.fit_ret_output(model, begun, features, folder)


@pytest.fixture
def ends(monkeypatch):
    """The tiny LMs' words have no stops: let a sentence end after every third word. Few and short answers will do."""
    monkeypatch.setattr(dialogues, "OTHERS", OTHERS[::9])
    monkeypatch.setattr(dialogues, "NUM_NEXT_REQUESTS", 4)
    monkeypatch.setattr(dialogues, "NUM_NEXT_OTHERS", 6)
    monkeypatch.setattr(dialogues, "NUM_PICTURED_REQUESTS", 2)
    monkeypatch.setattr(dialogues, "NUM_PICTURED_OTHERS", 3)
    monkeypatch.setattr(turns, "ANSWERED_FIRST", (8, 4))
    monkeypatch.setattr(turns, "ANSWERED_NEXT", (3, 2))
    monkeypatch.setattr(answers, "MAX_NEW_TOKENS", 8)
    for module in (answers, emission, turns):
        monkeypatch.setattr(
            module, "place_of_picture", lambda model, answer: 3 if answer.wanted and len(answer.ids) >= 3 else None
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_s_ret_is_fitted_and_leaves_its_text_alone(family, ends, tmp_path):
    model = grounded(family)
    chats = [[{"role": "user", "content": text}] for text in requests_of(CAPTIONS)[:4]]
    options = {"max_new_tokens": 8, "do_sample": False}
    before = [answer.text for answer in model.generate(chats, max_images=0, **options)]
    fit_ret(model, tmp_path, FEATURES)
    assert [answer.text for answer in model.generate(chats, max_images=0, **options)] == before
    for answer, text in zip(model.generate(chats, **options), before, strict=True):
        said = "".join(takewhile(lambda part: isinstance(part, str), answer.parts))
        assert text.startswith(said)
    assert model.adapter.has_ret_gate and torch.isfinite(model.adapter.ret_gate_weight).all()
    assert not model.adapter.ret_output.requires_grad and not model.adapter.ret_input.requires_grad
    assert torch.isfinite(model.adapter.ret_output).all()


def test_the_fitted_embedding_says_ret_where_it_was_told_to():
    torch.manual_seed(0)
    states, is_ret = torch.randn(400, 16), torch.rand(400) > 0.9
    states[:, 0] = torch.where(is_ret, 3.0, -1.0)
    found = fit_output_embedding(Places(states, torch.full((400,), 2.0), is_ret, torch.zeros(400)), weight=1.0)
    said = states @ found > 2.0
    assert (said & is_ret).sum() >= 0.9 * is_ret.sum() and (said & ~is_ret).sum() <= 0.1 * is_ret.sum()


def test_where_the_gate_is_shut_the_embedding_need_not_say_no():
    torch.manual_seed(0)
    states, is_ret = torch.randn(400, 16), torch.arange(400) < 100
    states[:200, 0] = 3.0  # The same for half of the places at which it does not belong.
    gate = torch.where((torch.arange(400) >= 100) & (torch.arange(400) < 200), -20.0, 0.0)
    found = fit_output_embedding(Places(states, torch.full((400,), 2.0), is_ret, gate), weight=1.0)
    assert ((states @ found + gate > 2.0) == is_ret).float().mean() > 0.95


@pytest.mark.parametrize("width", [8, 512])
def test_the_gate_opens_for_what_is_wanted_and_is_shut_for_the_rest_whatever_the_width(width):
    torch.manual_seed(0)
    openings, wanted = torch.randn(300, width) + 40, torch.arange(300) % 3 == 0
    openings[:, : width // 8] += torch.where(wanted, 3.0, -3.0)[:, None]
    weight, bias = fit_gate(openings[:200], wanted[:200])
    gate = (openings @ weight + bias).clamp_max(0)[200:]
    assert bool((gate[~wanted[200:]] < -2).all())
    assert (gate[wanted[200:]] > -2).float().mean() > 0.9


def test_answers_and_states_are_computed_once(ends, tmp_path, monkeypatch):
    model, other = grounded(), grounded()
    fit_ret(model, tmp_path)
    monkeypatch.setattr(other.lm, "generate", lambda **_: pytest.fail("answered again"))
    fit_ret(other, tmp_path)
    assert torch.equal(model.adapter.ret_output, other.adapter.ret_output)
    monkeypatch.undo()


@pytest.mark.parametrize("damage", ["cut", "other tensors", "fewer ids"])
def test_kept_answers_that_are_damaged_are_given_again(damage, tmp_path):
    model = grounded()
    whole = answers_to(model, ["w3"], ["w4 w5"], tmp_path)
    (path,) = tmp_path.iterdir()
    tensors = load_file(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    elif damage == "other tensors":
        save_file({"states": tensors["states"]}, path)
    else:
        save_file({**tensors, "ids": tensors["ids"][1:].clone()}, path)
    assert answers_to(model, ["w3"], ["w4 w5"], tmp_path) == whole
    assert torch.equal(load_file(path)["ids"], tensors["ids"])


def test_training_keeps_what_was_fitted(ends, tmp_path):
    fitted = []
    for steps in (1, 3):
        model = grounded()
        GroundingTrainer(model, arguments(tmp_path, max_steps=steps), ROWS).train()
        fitted.append([embedding.detach().clone() for embedding in model.adapter.ret_embeddings()])
    assert all(torch.allclose(one, other, rtol=1e-5) for one, other in zip(*fitted, strict=True))
    assert len(list((tmp_path / "features" / "answers").iterdir())) == 5


def test_a_run_goes_on_in_a_new_process_after_ret_was_fitted(ends, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    fitted, model = grounded(), grounded()
    GroundingTrainer(fitted, arguments(tmp_path, max_steps=2, **saving), ROWS).train()
    trainer = GroundingTrainer(model, arguments(tmp_path, max_steps=3, **saving), ROWS)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
    assert torch.allclose(model.adapter.ret_output, fitted.adapter.ret_output, rtol=1e-5)


def test_damaged_caches_are_made_again(ends, tmp_path):
    model, other = grounded(), grounded()
    fit_ret(model, tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(b"[[1")
    fit_ret(other, tmp_path)
    assert torch.equal(model.adapter.ret_output, other.adapter.ret_output)


def test_without_a_chat_template_or_with_one_embedding_nothing_changes(ends):
    for model in (grounded(template=None), grounded("qwen2_tied", tied_ret=True)):
        before = {name: value.clone() for name, value in model.adapter.state_dict().items()}
        assert emission.fit_ret_input(model, CAPTIONS) is None
        assert all(torch.equal(value, before[name]) for name, value in model.adapter.state_dict().items())


def test_a_template_that_refuses_system_messages_gets_none():
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
    one, other = answers_to(grounded(template=refusing), ["w5", "w5"], [], None)
    assert one == other


def test_later_turns_stand_behind_the_first_turn_and_the_first_sentence_of_its_answer(ends, monkeypatch):
    seen = []

    def recorded(model, asked, others, *options, max_new_tokens=None):
        seen.append((asked, others, max_new_tokens))
        return answers_to(model, asked, others, *options, max_new_tokens=max_new_tokens)

    model = grounded()
    monkeypatch.setattr(turns, "answers_to", recorded)
    first = turns.first_answers(model, CAPTIONS, {}, None)
    later, later_begun = turns.later_answers(model, first, None, None)
    found = [*first.answers, *first.begun, *later, *later_begun]
    wanted = [(chats, is_wanted) for *kinds, _ in seen for chats, is_wanted in zip(kinds, (True, False), strict=True)]
    assert [most for *_, most in seen] == [None, 1, None, 1, 1]
    assert list(map(len, (chats for *kinds, _ in seen for chats in kinds))) == [8, 4, 4, 12, 3, 2, 1, 4, 2, 3]
    assert all(len(answer.states) == 1 for answer in [*first.begun, *later_begun])
    (requests, *_), _, *later_seen, _ = seen
    assert [answer.wanted for answer in found] == [of_all for chats, of_all in wanted for _ in chats]
    of_text = dict(zip(requests, answers_to(model, requests, [], None), strict=True))
    chats = [chat for *kinds, _ in later_seen for kind in kinds for chat in kind]
    for text, shown, _ in chats:
        assert shown.caption == first.shown[text]
        said = of_text[text].ids
        assert shown.sentence == model.tokenizer.decode(list(said[:3])).strip()
        assert shown.rest in ("", model.tokenizer.decode(list(said[3:])).strip())
    assert {bool(shown.rest) for _, shown, _ in chats} == {True, False}


@given(st.integers(1, 120))
def test_users_show_pictures_of_their_own_whatever_there_is(count):
    captions = [f"A w{i}." for i in range(count)]
    asked, others = dialogues.pictured_turns(captions)
    assert (len(asked), len(others)) == (dialogues.NUM_PICTURED_REQUESTS, dialogues.NUM_PICTURED_OTHERS)
    for (turn,) in [*asked, *others]:
        assert turn.caption in captions and turn.rest and not turn.sentence and "{" not in turn.rest


def test_where_the_data_has_requests_the_gate_hears_others_too(ends):
    model = grounded()
    first = turns.first_answers(model, CAPTIONS, {"w5 w6": CAPTIONS[0]}, None)
    assert first.requests == ["w5 w6", *requests_of(CAPTIONS)] and first.answered[0] == "w5 w6"
    assert sum(answer.wanted for answer in first.answers) == 1
    assert sum(answer.wanted for answer in first.begun) == len(CAPTIONS)


@torch.no_grad()
def test_a_picture_of_the_user_s_own_stands_before_the_words():
    model, chat = grounded(), (Shown("", "w21", "w5 w6"),)
    tokens = torch.randn(1, model.adapter.embedding_mean.shape[0])
    (shown,), (in_words,) = (answers_to(model, [chat], [], None, image_tokens=t) for t in ({"w21": tokens}, None))
    assert [token for token in shown.prompt if token in (-1, 5, 6)] == [-1, 5, 6]
    assert [token for token in in_words.prompt if token in (21, 5, 6)] == [21, 5, 6]


@torch.no_grad()
def test_a_picture_in_a_chat_is_its_image_tokens_and_else_its_caption():
    model, chat = grounded(num_visual_tokens=2), ("w3", Shown("w4", "w21", "w6"), "w5")
    in_words, text = (answers_to(model, [], [one], None)[0] for one in (chat, ("w3", "w4 w21 w6", "w5")))
    assert in_words.prompt == text.prompt and torch.equal(in_words.states, text.states)
    tokens = torch.randn(2, model.adapter.embedding_mean.shape[0])
    picture, other = (answers_to(model, [], [chat], None, image_tokens={"w21": rows})[0] for rows in (tokens, -tokens))
    assert picture.prompt.count(-1) == 2 and not torch.allclose(picture.states[0], other.states[0])
    before = picture.prompt.index(-1)
    ids, first = torch.tensor([picture.prompt]), model.frozen_lm.vocabulary.first_image_id
    ids[0, before : before + 2] = torch.arange(first, first + 2)
    last = torch.tensor([ids.shape[1] - 1])
    read = model.frozen_lm.hidden_states(ids, torch.ones_like(ids), last, image_tokens=tokens)[0]
    assert torch.allclose(picture.states[0], read[0], atol=1e-5)


def test_answers_behind_other_pictures_are_others(tmp_path):
    model, chat = grounded(), ("w3", Shown("w4", "w21"), "w5")
    rows = torch.randn(2, 1, model.adapter.embedding_mean.shape[0])
    for row in (*rows, *rows):
        answers_to(model, [chat], [], tmp_path, image_tokens={"w21": row})
    assert len(list(tmp_path.iterdir())) == 2


def test_a_template_of_one_turn_only_leaves_later_turns_out(ends):
    refusing = "{% if messages[-1]['role'] != messages[0]['role'] or messages|length > 1 %}{{ raise_exception('no') }}"
    model = grounded(template=refusing + "{% endif %}" + TEMPLATE)
    first = turns.first_answers(model, CAPTIONS, {}, None)
    assert len(first.answers) + len(first.begun) == len(requests_of(CAPTIONS)) + len(others_about(CAPTIONS))
    assert turns.later_answers(model, first, None, None) == ([], [])


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_later_turns_are_as_many_as_asked_for_whatever_there_is_to_talk_about(captions, requests, answered):
    firsts = [(f"q{i}", f"a{i}") for i in range(answered)]
    asked, others = later_turns([f"w{i}." for i in range(captions)], [f"r{i}" for i in range(requests)], firsts)
    assert len(asked) == dialogues.NUM_NEXT_REQUESTS and len(others) == dialogues.NUM_NEXT_OTHERS
    assert {turn[:2] for turn in asked} <= set(firsts) and not any("{" in text for turn in others for text in turn)
    assert later_turns(["w1"], ["r1"], []) == ([], [])


def test_the_place_of_a_picture_is_behind_the_first_sentence():
    words = {4: "A", 5: " fox.", 6: " A", 7: " bus."}
    tokenizer = SimpleNamespace(decode=lambda ids, **_: "".join(words[i] for i in ids))
    model = SimpleNamespace(tokenizer=tokenizer)
    place = lambda ids, ended: place_of_picture(model, Answer((1,), ids, ended, True))  # noqa: E731
    assert place((4, 5, 6, 7), True) == place((4, 5, 6), False) == place((4, 5), True) == 2
    assert place((4, 5), False) is None and place((4, 6), False) is None
    assert place((4, 6), True) == 2


def test_dialogues_are_filled_and_captions_become_requests():
    for captions in (["A cat.", "A very long caption of a dog."], [f"A w{i}." for i in range(80)]):
        said = others_about(captions)
        assert len(said) == len(OTHERS) and not any("{" in text for text in said)
        assert said[0] == OTHERS[0] and not any("very long" in text for text in said)
    assert "Show me a picture: a cat." in requests_of(["A cat."])


@given(st.integers(0, 300), st.integers(1, 200))
def test_as_many_texts_are_taken_as_asked_for_at_even_distances(length, count):
    taken = dialogues.evenly(range(length), count)
    assert len(taken) == min(length, count)
    gaps = {after - before for before, after in zip(taken, taken[1:], strict=False)}
    assert len(gaps) <= 2 and all(gap > 0 for gap in gaps)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_what_stands_before_a_picture_is_read_once_and_alike(family, monkeypatch):
    model = ground(build(family), Eye(), tokenizer(), image_processor, GroundingConfig(retrieval_dim=6)).eval()
    befores, afters = [(1, 20, 21), (1, 20, 21, 22, 30, 31), (1, 40)], [(5, 6, 7), (8,), (9, 10)]
    read = ret_input._reader(model, befores, afters)
    monkeypatch.setattr(ret_input, "read_beginnings", lambda *args: None)
    whole = ret_input._reader(model, befores, afters)
    for scale in (1, -1):
        model.adapter.ret_input.mul_(scale)
        states = read()
        assert states.shape[0] == 6
        torch.testing.assert_close(states, whole(), atol=1e-4, rtol=1e-3)
