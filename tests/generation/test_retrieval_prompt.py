"""What is read for retrieval stands after what was said, and in nothing that anyone sees."""

import pytest
import torch
from tokenizers import normalizers

from tests.tiny import FAMILIES, Eye, build, grounded, image_processor, picture, tokenizer
from visual_ground import GroundingConfig, GroundingError, ImageIndex, ground
from visual_ground.generation.generate import ret_vectors
from visual_ground.generation.listener import AnswerListener

PROMPT = "w40 w41 w42"


def answer(model, prompts, script):
    """Return the ids of answers, and the vectors of their `[RET]`s."""
    batch = model.prepare(prompts)
    start = batch["input_ids"].shape[1]
    image_tokens = model.active.image_tokens(batch.get("pixel_values"))
    new = torch.tensor([script] * len(batch["input_ids"]))
    ids = torch.cat([batch["input_ids"], new], 1)
    return ids, ret_vectors(model.frozen_lm, model.active, ids, batch["attention_mask"], start, image_tokens)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_an_answers_vector_is_that_of_the_prompt_and_the_answer_up_to_it(family):
    model = grounded(family, retrieval_prompt=PROMPT)
    prompts = [["w9", picture(0), "w5"], ["w4"], [picture(1), "w6 w7 w8"]]
    if family == "mamba":  # It has no left-padded batches.
        prompts = prompts[:1]
    ret = model.ret_token_id
    _, vectors = answer(model, prompts, [20, ret, 21, 22, ret])
    for prompt, found in zip(prompts, vectors, strict=True):
        said = [[*prompt, "w20"], [*prompt, "w20 [RET] w21 w22"]]
        assert torch.allclose(found, torch.cat([model.embed_text([one]) for one in said]), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_picture_of_a_turn_is_half_what_was_asked_and_half_what_was_said(family, monkeypatch):
    model = grounded(family, retrieval_prompt=PROMPT)
    monkeypatch.setattr(type(model.processor), "opens_turn", lambda self, ids: 0 <= ids[-1] == 9)
    ret = model.ret_token_id
    asked = ["w4", picture(0), "w9"]
    _, (vectors,) = answer(model, [asked], [20, ret, 21, ret])
    opening, first, second = (model.embed_text([[*asked, *more]])[0] for more in ([], ["w20"], ["w20 [RET] w21"]))
    assert torch.allclose(vectors[0], torch.nn.functional.normalize(opening + first, dim=0), atol=1e-4)
    assert torch.allclose(vectors[1], second, atol=1e-4)
    _, (vectors,) = answer(model, [asked], [ret])
    assert torch.allclose(vectors[0], opening, atol=1e-4), "nothing was said that could have drifted"


ROLE = "{{ {'user': 'w50', 'assistant': 'w51'}[m.role] }}"
CHAT = (
    f"{{% for m in messages %}}{ROLE} {{{{ m.content }}}} </s> {{% endfor %}}"
    "{% if add_generation_prompt %}w51 </s> {% endif %}"
)
TALK = [
    {"role": role, "content": text} for role, text in (("user", "w4 w5"), ("assistant", "w6 w7"), ("user", "w8 w9"))
]


@torch.no_grad()
def test_in_a_longer_chat_what_is_asked_now_is_also_read_alone(monkeypatch):
    model = grounded(retrieval_prompt=PROMPT)
    model.tokenizer.chat_template = CHAT
    _, (vectors,) = answer(model, [TALK], [20, model.ret_token_id])
    opening, alone = model.embed_text([TALK, TALK[-1:]])
    with monkeypatch.context() as patch:
        patch.setattr(type(model.processor), "opens_turn", lambda self, ids: False)
        suffix = model.processor.encode_text(PROMPT)
        patch.setattr(type(model.processor), "retrieval_suffix", lambda self, ids: suffix)
        _, (place,) = answer(model, [TALK], [20, model.ret_token_id])
    mean = torch.nn.functional.normalize(opening + alone + place[0], dim=0)
    assert torch.allclose(vectors[0], mean, atol=1e-4)


@torch.no_grad()
def test_a_chat_reads_alike_while_it_is_said_and_afterwards(monkeypatch):
    model = grounded(retrieval_prompt=PROMPT)
    model.tokenizer.chat_template = CHAT
    index = ImageIndex.build(model, [picture(i) for i in range(5)])
    shown = [[{**TALK[0], "content": ["w4", picture(1)]}, *TALK[1:]], TALK[:1], TALK]
    options = dict(ret_bias=4.0, max_new_tokens=8, do_sample=False)
    heard = model.generate(shown, index, **options)
    monkeypatch.setattr(AnswerListener, "vectors_of", lambda self, sequences: None)
    for one, other in zip(heard, model.generate(shown, index, **options), strict=True):
        assert one.text == other.text and one.images
        assert [i.score for i in one.images] == pytest.approx([i.score for i in other.images], abs=1e-4)


@torch.no_grad()
def test_rows_of_a_batch_have_the_vectors_that_they_have_alone():
    model = grounded("qwen2_tied", retrieval_prompt=PROMPT)
    prompts = [["w9", picture(0)], ["w4 w5 w6 w7 w8"], [picture(1), "w6"]]
    script = [20, model.ret_token_id, 21, model.ret_token_id]
    _, together = answer(model, prompts, script)
    for prompt, vectors in zip(prompts, together, strict=True):
        assert torch.allclose(answer(model, [prompt], script)[1][0], vectors, atol=1e-5)


@torch.no_grad()
def test_the_prompt_changes_the_vectors_and_neither_the_text_nor_how_the_lm_goes_on():
    answers = []
    for prompt in ("", PROMPT):
        model = grounded("llama_untied", retrieval_prompt=prompt)
        index = ImageIndex.build(model, [picture(i) for i in range(5)])
        answers.append(
            model.generate(["w4 w5", ["w9", picture(0)]], index, ret_bias=4.0, max_new_tokens=8, do_sample=False)
        )
    for without, with_prompt in zip(*answers, strict=True):
        assert without.text == with_prompt.text and len(without.images) == len(with_prompt.images)
        assert PROMPT.split()[0] not in with_prompt.text
    assert any(one.images for one in answers[0])
    scores = [[image.score for one in some for image in one.images] for some in answers]
    assert scores[0] != scores[1]


@torch.no_grad()
def test_an_answer_that_fills_the_context_still_gets_its_picture():
    model = grounded(lm=build("gpt2", n_positions=16), retrieval_prompt=PROMPT)
    _, vectors = answer(model, ["w4 w5 w6"], [20] * 11 + [model.ret_token_id])
    assert torch.isfinite(vectors[0]).all()


def test_the_prompt_goes_on_with_a_space_except_where_it_opens_a_turn():
    model = grounded(retrieval_prompt=PROMPT)
    processor, texts = model.processor, []
    processor.encode_text = lambda text: texts.append(text) or [4]
    for ids in ([4], [4, model.ret_token_id], [4, -1], [4, 1]):
        processor.retrieval_suffix(ids)
    assert texts == [" " + PROMPT] * 3 + [PROMPT]


def test_a_prompt_of_which_the_tokenizer_makes_nothing_is_refused():
    mute, lm = tokenizer(), build("gpt2")
    mute.backend_tokenizer.normalizer = normalizers.Replace("z", "")
    config = GroundingConfig(retrieval_prompt="zzz")
    with pytest.raises(GroundingError, match="makes no tokens of the retrieval prompt 'zzz'"):
        ground(lm, Eye(), mute, image_processor, config)
    ground(lm, Eye(), tokenizer(), image_processor, config).unground()
