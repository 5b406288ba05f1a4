"""With `see_images`, an answer goes on as if its images had been in the prompt where they were shown."""

import pytest
import torch
from transformers import GenerationConfig

from tests.tiny import FAMILIES, grounded, picture
from visual_ground import GroundingError, ImageIndex
from visual_ground.generation.growing import joined

PROMPT = ["w4 w5", picture(0), "w6"]
SEES = dict(ret_bias=1e3, min_new_tokens_before_ret=1, min_new_tokens_between_rets=2, max_images=2, see_images=True)
LENGTH = 9
GREEDY = dict(do_sample=False, max_new_tokens=LENGTH, min_new_tokens=LENGTH)


def make_index(model, images=True):
    vectors = torch.nn.functional.normalize(torch.randn(9, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    return ImageIndex(vectors, [f"p{i}" for i in range(9)], [picture(10 + i) for i in range(9)] if images else None)


def shape(parts):
    return [
        part if isinstance(part, str) else (part.id, None if part.score is None else round(part.score, 3))
        for part in parts
    ]


def generated_ids(model, monkeypatch, *arguments, **options):
    """Return an answer, and the ids that the LM has generated for it."""
    sequences, generate = [], model.frozen_lm.generate

    def recorded(ids, *given, **named):
        sequences.append(generate(ids, *given, **named)[:, ids.shape[1] :])
        return torch.cat([ids, sequences[-1]], 1)

    with monkeypatch.context() as patched:
        patched.setattr(model.frozen_lm, "generate", recorded)
        outputs = model.generate(*arguments, **options)
    return outputs, sequences[-1].tolist()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("k, at_once", [(1, 1), (3, 1), (2, 2)])
def test_the_rest_is_what_comes_after_the_same_interleaved_sequence(family, k, at_once, monkeypatch):
    model = grounded(family, num_visual_tokens=k)
    index = make_index(model)
    (answer,), (ids,) = generated_ids(model, monkeypatch, [PROMPT], index, **GREEDY, **SEES, images_per_ret=at_once)
    assert len(answer.images) == 2 * at_once and model.ret_token_id not in ids
    batch = model.prepare([PROMPT])
    pixels = torch.cat([batch["pixel_values"], model.vision.preprocess([image.image for image in answer.images])])
    first_image = model.processor.vocabulary.first_image_id
    assert [i - first_image - k for i in ids if i >= first_image] == list(range(2 * at_once * k)), (
        "all tokens, in order"
    )
    whole = torch.cat([batch["input_ids"], torch.tensor([ids])], 1)
    logits = model(whole, torch.ones_like(whole), pixels).logits[0]
    start = batch["input_ids"].shape[1]
    for step, token in enumerate(ids):
        scores = logits[start + step - 1].clone()
        scores[model.ret_token_id], scores[2] = float("-inf"), float("-inf")
        if token < first_image:
            assert scores[token] >= scores.max() - 1e-4, f"step {step} is greedy after all that came before"


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama_untied", "gpt2", "bloom", "mamba"])
def test_streams_batches_and_answers_alone_are_the_same(family):
    model = grounded(family, num_visual_tokens=2)
    index = make_index(model)
    prompts = [PROMPT, "w9", "w4 w5 w6 w7 w8"]
    options = dict(GREEDY, **SEES)
    alone = [shape(model.generate([prompt], index, **options)[0].parts) for prompt in prompts]
    assert [shape(joined(model.stream([prompt], index, **options))) for prompt in prompts] == alone
    together = [shape(output.parts) for output in model.generate(prompts, index, **options)]
    assert together == alone
    blind = model.generate([PROMPT], index, **{**options, "see_images": False})[0]
    assert shape(blind.parts) != alone[0], "what is seen makes a difference"


@torch.no_grad()
def test_what_cannot_be_opened_is_not_seen(tmp_path):
    model = grounded()
    picture(0).save(tmp_path / "gone.png")
    gone = ImageIndex(make_index(model).vectors, images=[str(tmp_path / "gone.png")] * 9)
    (tmp_path / "gone.png").unlink()
    for index in (None, make_index(model, images=False), gone):
        seeing, blind = (
            model.generate([PROMPT], index, **GREEDY, **{**SEES, "see_images": sees})[0] for sees in (True, False)
        )
        assert shape(seeing.parts) == shape(blind.parts)


@torch.no_grad()
def test_sampling_several_answers_and_whole_sentences():
    model = grounded(num_visual_tokens=2)
    torch.manual_seed(0)
    options = dict(do_sample=True, num_return_sequences=3, max_new_tokens=8, min_new_tokens=8)
    for given in (options, {"generation_config": GenerationConfig(**options)}):
        for sees in (SEES, {**SEES, "see_images": False}):
            answers = model.generate([PROMPT, "w4"], make_index(model), **given, **sees)
            assert len(answers) == 6 and all(answer.images for answer in answers)
    cut = model.generate([PROMPT], make_index(model), **GREEDY, **SEES, complete_sentences=True)[0]
    assert cut.text.endswith("\u2026")


@torch.no_grad()
def test_a_tokenizer_without_padding(monkeypatch):
    model = grounded("llama_untied", bos=False)
    model.tokenizer.eos_token = None
    model.lm.generation_config.eos_token_id = model.lm.generation_config.pad_token_id = None
    index = make_index(model)
    alone = shape(model.generate(["w4"], index, **GREEDY, **SEES)[0].parts)
    assert shape(model.generate(["w4", "w5 w6"], index, **GREEDY, **SEES)[0].parts) == alone


def test_beams_cannot_see():
    model = grounded()
    with pytest.raises(GroundingError, match="see_images"):
        model.generate([PROMPT], make_index(model), num_beams=2, **SEES)
