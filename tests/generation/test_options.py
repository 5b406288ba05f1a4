"""Any options of transformers' `generate`: no image id is ever generated, and what is said of the length holds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, SynthIDTextWatermarkingConfig
from transformers.generation import WatermarkingConfig

from tests.lm.tokenizers_of_all_habits import byte_level
from tests.tiny import Eye, build, grounded, image_processor, picture
from visual_ground import ground
from visual_ground.errors import GroundingTypeError, GroundingValueError
from visual_ground.generation.generate import generate_ids
from visual_ground.generation.retrieval_token import RetrievalSettings
from visual_ground.lm.base.vocabulary import VirtualVocabulary

PROMPTS = {"text": ["w4 w5"], "image": [["w9", picture(0), "w5"]]}
# One call for each kind of processor that transformers can put into a call.
PROCESSORS = {
    "guidance": dict(guidance_scale=1.5),
    "less guidance": dict(guidance_scale=0.5),
    "sampling": dict(do_sample=True, temperature=3.0, top_k=0),
    "sampled guidance": dict(do_sample=True, guidance_scale=3.0, top_p=0.9),
    "finite values": dict(remove_invalid_values=True, do_sample=True, temperature=50.0, top_k=0),
    "renormalized": dict(renormalize_logits=True, guidance_scale=1.5),
    "top h": dict(do_sample=True, top_h=0.4),
    "min p": dict(do_sample=True, min_p=0.05),
    "typical": dict(do_sample=True, typical_p=0.5),
    "epsilon": dict(do_sample=True, epsilon_cutoff=0.001),
    "eta": dict(do_sample=True, eta_cutoff=0.001),
    "repetition": dict(repetition_penalty=1.5, no_repeat_ngram_size=1, encoder_repetition_penalty=1.5),
    "encoder n-grams": dict(encoder_no_repeat_ngram_size=2),
    "bias": dict(sequence_bias=[[[5], 3.0]], bad_words_ids=[[6]]),
    "prefix": dict(prefix_allowed_tokens_fn=lambda row, ids: [7, 8]),
    "forced": dict(forced_bos_token_id=5, forced_eos_token_id=2),
    "length": dict(min_new_tokens=3, exponential_decay_length_penalty=(1, 1.5)),
    "suppressed": dict(suppress_tokens=[5], begin_suppress_tokens=[6]),
    "watermark": dict(watermarking_config=WatermarkingConfig(bias=20.0, greenlist_ratio=0.5)),
    "synth id": dict(
        do_sample=True,
        watermarking_config=SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=2, sampling_table_size=64),
    ),
    "beams": dict(num_beams=3, guidance_scale=1.5),
    "prompt lookup": dict(prompt_lookup_num_tokens=2),
}


class Hostile(LogitsProcessor):
    """Makes every forbidden column the best one."""

    def __call__(self, input_ids, scores):
        return torch.where(scores == float("-inf"), 1e4, scores)


def ids_of(model, prompts, **options):
    batch = model.prepare(prompts)
    images = model.active.image_tokens(batch.get("pixel_values"))
    sequences = generate_ids(model.frozen_lm, model.active, batch, images, RetrievalSettings(), options)
    return sequences[:, batch["input_ids"].shape[1] :]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # transformers' own advice on odd combinations
@pytest.mark.parametrize("prompts", sorted(PROMPTS))
@pytest.mark.parametrize("spare", [False, True], ids=["all columns", "spare columns masked"])
@pytest.mark.parametrize(
    "options", [*PROCESSORS.values(), dict(logits_processor=[Hostile()])], ids=[*PROCESSORS, "own"]
)
def test_no_processor_makes_a_forbidden_column_a_candidate(prompts, spare, options):
    model = grounded("llama_untied", num_tokens=90 if spare else 100, mask_spare_columns=spare)
    ids = ids_of(model, PROMPTS[prompts], max_new_tokens=5, **options)
    vocabulary = model.frozen_lm.vocabulary
    assert ((ids < vocabulary.num_tokens) | (ids == vocabulary.ret_token_id)).all(), ids


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_guidance_without_an_unconditional_difference_is_no_guidance():
    model = grounded("llama_untied")
    plain, guided = (
        ids_of(model, PROMPTS["image"], max_new_tokens=6, **o) for o in ({}, {"guidance_scale": 1.0 + 1e-7})
    )
    assert torch.equal(plain, guided)


@given(st.integers(4, 12), st.integers(4, 12), st.integers(2, 14), st.booleans(), st.integers(0, 3))
def test_the_forbidden_columns_are_those_that_are_added_as_infinite(rows, columns, tokens, mask_spare, images):
    vocabulary = VirtualVocabulary(rows, columns, tokens)
    logits = vocabulary.add_columns(torch.zeros(1, 1, columns), torch.zeros(1, 1), images, mask_spare)
    named = torch.zeros(logits.shape[-1], dtype=torch.bool)
    for part in vocabulary.forbidden_columns(mask_spare):
        named[part] = True
    assert torch.equal(named, logits[0, 0] == float("-inf"))


SAYING = st.sampled_from(["max_new_tokens", "max_length", "nothing"])


@settings(max_examples=15)
@given(SAYING, SAYING, SAYING)
@torch.no_grad()
def test_the_first_that_says_something_of_the_length_is_heard(option, given_config, own):
    prompt, lengths = ["w4 w5"], dict(zip((option, given_config, own), (3, 5, 7), strict=True))  # nearest first
    model = MODELS["never ends"]
    start = model.prepare(prompt)["input_ids"].shape[1]
    value = lambda name, n: {} if name == "nothing" else {name: n + start * (name == "max_length")}  # noqa: E731
    options, config = value(option, 3), value(given_config, 5)
    if config:
        options["generation_config"] = GenerationConfig(**config, eos_token_id=None)
    model.lm.generation_config = GenerationConfig(**value(own, 7), eos_token_id=None)
    said = [n for name, n in ((option, 3), (given_config, 5), (own, 7)) if name != "nothing"]
    assert ids_of(model, prompt, **options).shape[1] == (said or [64])[0], lengths


@torch.no_grad()
@pytest.mark.parametrize("least", [dict(min_new_tokens=80), dict(min_length=100)])
def test_the_default_length_is_no_less_than_what_is_asked_for_at_least(least):
    model = MODELS["never ends"]
    model.lm.generation_config = GenerationConfig(eos_token_id=None)
    said = ids_of(model, ["w4 w5"], **least).shape[1]
    assert said > 80


@torch.no_grad()
@pytest.mark.parametrize("where", ["option", "config", "own"])
def test_an_answer_that_its_end_ended_is_whole_wherever_the_end_is_said(where):
    model = grounded(lm=build("llama_untied", eos_token_id=None))
    words = model.generate(["w4 w5"], max_new_tokens=6, max_images=0)[0].text.split()
    end, options = int(words[3][1:]), {"max_new_tokens": 6, "max_images": 0}
    if where == "option":
        options["eos_token_id"] = end
    elif where == "config":
        options = {"max_images": 0, "generation_config": GenerationConfig(eos_token_id=end, max_new_tokens=6)}
    else:
        model.lm.generation_config.eos_token_id = end
    # Its own ends are no text; those of a call are words, such as a full stop.
    wanted = words[: 3 if where == "own" else 4]
    assert model.generate(["w4 w5"], complete_sentences=True, **options)[0].text.split() == wanted
    streamed = "".join(map(str, model.stream(["w4 w5"], complete_sentences=True, **options)))
    assert streamed.split() == wanted


@pytest.mark.parametrize(
    "field", ["images_per_ret", "max_images", "min_new_tokens_before_ret", "min_new_tokens_between_rets", "ret_bias"]
)
def test_settings_that_are_no_numbers_of_their_kind_are_refused(field):
    for value in (
        (float("nan"), float("inf"), "3", True, None) if field == "ret_bias" else (-1, 1.5, "3", True, float("nan"))
    ):
        with pytest.raises(GroundingValueError, match=field):
            RetrievalSettings(**{field: value})


@pytest.mark.parametrize("where", ["option", "own"])
@pytest.mark.parametrize("name", ["max_new_tokens", "max_length", "min_new_tokens", "min_length"])
def test_lengths_that_are_none_are_refused_by_name(name, where):
    model = grounded(lm=build("llama_untied", eos_token_id=None))
    for value in (-1, 2.5, "9", True, float("nan"), float("inf"), [9]):
        options = {name: value} if where == "option" else {}
        if where == "own":
            setattr(model.lm.generation_config, name, value)
        with pytest.raises(GroundingValueError, match=f"{name} must be a whole number"):
            model.generate(["w4"], **options)


MODELS = {"never ends": grounded(lm=build("llama_untied", eos_token_id=None))}


@torch.no_grad()
@pytest.mark.parametrize("prompt", ["a red cat", ["a red", picture(0), "cat"]], ids=["text", "image"])
def test_stop_strings_hold_wherever_they_are_said(prompt):
    words = byte_level()
    lm = build("llama_untied", vocab_size=len(words), bos_token_id=None, eos_token_id=None, pad_token_id=None)
    model = ground(lm, Eye(), words, image_processor)
    free = ids_of(model, [prompt], max_new_tokens=9)[0].tolist()
    wanted = words.decode(free[:3])[-1:]
    stops = [wanted] if wanted.isascii() else [words.decode([i]) for i in free if words.decode([i]).isascii()][:1]
    for options in (dict(stop_strings=stops), dict(generation_config=GenerationConfig(stop_strings=stops))):
        assert stops[0] in words.decode(ids_of(model, [prompt], max_new_tokens=9, **options)[0])
    model.lm.generation_config = GenerationConfig(stop_strings=stops)
    stopped = ids_of(model, [prompt], max_new_tokens=9)[0]
    assert stops[0] in words.decode(stopped) and stops[0] not in words.decode(stopped[:-1])


@torch.no_grad()
@pytest.mark.parametrize("where", ["option", "config", "own"])
def test_an_answer_that_a_stop_string_ended_is_whole(where):
    words = byte_level()
    lm = build("llama_untied", vocab_size=len(words), bos_token_id=None, eos_token_id=None, pad_token_id=None)
    model = ground(lm, Eye(), words, image_processor)
    free = ids_of(model, ["a red cat"], max_new_tokens=9)[0].tolist()
    stop = next(text for text in (words.decode([i]) for i in free[2:]) if text.isascii())

    def answers(**options):
        if where == "own":
            model.lm.generation_config = GenerationConfig(stop_strings=options.pop("stop_strings"))
        elif where == "config":
            config = GenerationConfig(stop_strings=options.pop("stop_strings"), max_new_tokens=9)
            options = {**options, "generation_config": config}
        options = {"max_images": 0, **({} if where == "config" else {"max_new_tokens": 9}), **options}
        return [
            model.generate(["a red cat"], **options)[0].text,
            model.generate(["a red cat"], see_images=True, **options)[0].text,
            "".join(map(str, model.stream(["a red cat"], **options))),
        ]

    plain = answers(stop_strings=[stop])
    assert stop in plain[0] and answers(stop_strings=[stop], complete_sentences=True) == plain
    # One that never comes ends nothing: what ran out of tokens is cut.
    assert all(text not in plain for text in answers(stop_strings=["never said"], complete_sentences=True))


def test_what_cannot_be_is_refused_by_name():
    model = MODELS["never ends"]
    for options, match in [
        (dict(assistant_model=build("llama_untied")), "assistant_model cannot"),
        (dict(generation_config=GenerationConfig(assistant_early_exit=1)), "assistant_early_exit cannot"),
        (dict(max_length=1), "counts the prompt too"),
        (dict(inputs_embeds=torch.zeros(1, 2, 32)), "takes no inputs_embeds: the prompts are the first argument"),
        (dict(input_ids=torch.zeros(1, 2, dtype=torch.long)), "takes no input_ids"),
        (dict(attention_mask=torch.ones(1, 2)), "takes no attention_mask"),
        (dict(token_healing=True), "takes no token_healing: it writes the prompts anew"),
        (dict(generation_config=GenerationConfig(token_healing=True)), "takes no token_healing"),
        (dict(prompt_lookup_num_tokens=2, guidance_scale=1.5), "guidance_scale=1.5 reads a second prompt"),
    ]:
        for prompt in ("w4 w5", [["w4", picture(0)]]):
            with pytest.raises(GroundingValueError, match=match):
                model.generate(prompt, **options)
    with pytest.raises(GroundingTypeError, match="GenerationConfig, got dict"):
        model.generate("w4", generation_config={"max_length": 3})
    with pytest.raises(GroundingValueError, match="one prompt at a time"):
        model.generate(["w4", "w5"], prompt_lookup_num_tokens=2)


@torch.no_grad()
@pytest.mark.parametrize("prompts", [["w4 w5 w4 w5 w4"], [["w4 w5", picture(0), "w4 w5", picture(1)]]])
def test_prompt_lookup_gives_the_same_answer(prompts):
    model = grounded("llama_untied")
    options = dict(max_new_tokens=8, logits_processor=LogitsProcessorList())
    assert torch.equal(ids_of(model, prompts, **options), ids_of(model, prompts, prompt_lookup_num_tokens=3, **options))
