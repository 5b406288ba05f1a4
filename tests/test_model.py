"""Laws a to e of a grounded model, over very different families, with [RET] appended or in a spare row."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import StoppingCriteriaList, TextStreamer

from tests.tiny import FAMILIES, Eye, build, grounded, image_processor, picture, tokenizer
from visual_ground import GroundedModel, GroundingConfig, GroundingError, ImageIndex, ground
from visual_ground.errors import GroundingStateError, GroundingTypeError, GroundingValueError
from visual_ground.generation.output import RetrievedImage

GREEDY = dict(max_new_tokens=8, do_sample=False)
PROMPTS = ["w4 w5 w6", ["w9", picture(0), "w5", picture(1)], [picture(2)], ["w4", picture(3), picture(4), "w6 w7 w8"]]


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    return request.param


@pytest.fixture(params=[100, 95], ids=["appended", "spare"])
def num_tokens(request):
    return request.param


def state_of(lm):
    hooks = [len(getattr(m, name)) for m in lm.modules() for name in ("_forward_hooks", "_forward_pre_hooks")]
    modes = [m.training for m in lm.modules()], [p.requires_grad for p in lm.parameters()]
    return {k: v.clone() for k, v in lm.state_dict().items()}, hooks, modes, copy.deepcopy(lm.config.to_dict())


def assert_same_state(one, two):
    assert one[1:] == two[1:]
    assert one[0].keys() == two[0].keys() and all(torch.equal(one[0][k], two[0][k]) for k in one[0])


def make_index(model, count=5):
    return ImageIndex.build(model, [picture(i) for i in range(count)], [f"p{i}" for i in range(count)])


@torch.no_grad()
def test_law_a_text_only_is_the_base(family, num_tokens):
    lm, ids = build(family), torch.randint(4, 95, (2, 6))
    mask = torch.ones_like(ids)
    options = dict(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    base, text = lm(input_ids=ids, output_hidden_states=True), lm.generate(**options, suppress_tokens=[95])
    model = grounded(lm=lm, num_tokens=num_tokens)
    ret = model.ret_token_id
    ours = model(ids, mask, output_hidden_states=True)
    keep = [i for i in range(100) if i != ret]
    assert torch.equal(ours.logits[..., keep], base.logits[..., keep])
    assert all(torch.equal(a, b) for a, b in zip(base.hidden_states, ours.hidden_states, strict=True))
    assert torch.equal(lm.generate(**options, suppress_tokens=sorted({95, ret})), text)
    with model.disable_adapter():
        assert torch.equal(lm.generate(**options, suppress_tokens=[95]), text)
        assert torch.equal(model(ids, mask).logits, base.logits)


@torch.no_grad()
def test_law_b_unground_restores_everything(family):
    lm, words = build(family).train().requires_grad_(True), tokenizer()
    before, vocabulary = state_of(lm), dict(words.get_vocab())
    model = ground(lm, Eye(), words, image_processor)
    with pytest.raises(GroundingStateError, match="grounded already"):
        ground(lm, Eye(), words, image_processor)
    with pytest.raises(GroundingError):
        model(torch.tensor([[5, model.frozen_lm.vocabulary.first_image_id]]))
    model.generate(PROMPTS[1], **GREEDY)
    assert model.unground() is lm
    assert_same_state(before, state_of(lm))
    assert words.get_vocab() == vocabulary
    with pytest.raises(GroundingStateError, match="ungrounded"):
        model.generate("w4")
    ground(lm, Eye(), words, image_processor).unground()
    assert_same_state(before, state_of(lm))


class PassThrough(nn.Module):
    """An LM that returns its embeddings as its last hidden state."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
        self.config = type("Config", (), {"is_encoder_decoder": False, "_name_or_path": ""})()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def generate(self):
        raise NotImplementedError

    def forward(self, input_ids, attention_mask=None, use_cache=None, output_hidden_states=None):
        return type("Output", (), {"logits": self.head(self.embed(input_ids))})()


interleavings = st.lists(
    st.lists(st.sampled_from(["w4", "w5", "image"]), min_size=1, max_size=5), min_size=1, max_size=4
)


@torch.no_grad()
@settings(max_examples=40)
@given(interleavings, st.sampled_from(["left", "right"]), st.integers(1, 3))
def test_law_c_every_visual_row_is_seen_at_its_place(batch, side, k):
    model = grounded(lm=PassThrough(), num_tokens=20, num_visual_tokens=k)
    numbers = iter(range(100))
    prompts = [[picture(next(numbers)) if part == "image" else part for part in prompt] for prompt in batch]
    features = [
        model.vision(model.vision.preprocess([p])) for prompt in prompts for p in prompt if not isinstance(p, str)
    ]
    rows = iter(torch.cat([model.adapter.image_tokens(f) for f in features]) if features else [])
    inputs = model.prepare(prompts, padding_side=side)
    with model.frozen_lm.bind(model.active.image_tokens(inputs.get("pixel_values"))) as context:
        model.frozen_lm.run(inputs["input_ids"], inputs["attention_mask"])
    for prompt, ids, mask, seen in zip(
        batch, inputs["input_ids"], inputs["attention_mask"], context.head_input, strict=True
    ):
        ids, seen = ids[mask.bool()], seen[mask.bool()]
        assert int((ids >= model.frozen_lm.vocabulary.first_image_id).sum()) == k * prompt.count("image")
        for token, state in zip(ids, seen, strict=True):
            wanted = next(rows) if token >= 20 else model.lm.embed.weight[token]
            assert torch.allclose(state, wanted, atol=1e-5)


@torch.no_grad()
def test_law_d_a_batch_equals_its_rows(family):
    model = grounded(family, ret_token="[RET]")
    index = make_index(model)
    options = dict(ret_bias=3.0, max_images=2, min_new_tokens_before_ret=1, min_new_tokens_between_rets=0, **GREEDY)
    prompts = PROMPTS if family != "mamba" else [PROMPTS[1], ["w8", picture(0), "w5", picture(1)]]
    together = model.generate(prompts, index, **options)
    for prompt, answer in zip(prompts, together, strict=True):
        for extra in ({}, dict(use_cache=False), dict(num_beams=1)):
            alone = model.generate([prompt], index, **options, **extra)[0]
            assert str(alone) == str(answer)
    assert any(answer.images for answer in together)
    vectors = model.embed_text(prompts)
    single = torch.cat([model.embed_text([prompt]) for prompt in prompts])
    assert torch.allclose(vectors, single, atol=1e-4)
    scores = model.log_likelihood(prompts, ["w4 w5"] * len(prompts))
    assert torch.allclose(scores, torch.cat([model.log_likelihood([p], ["w4 w5"]) for p in prompts]), atol=1e-3)


@torch.no_grad()
def test_law_e_saved_and_loaded_it_is_the_same(family, tmp_path):
    model = grounded(family, num_visual_tokens=2, text_layers=(-1, 1))
    model.save_pretrained(tmp_path / "one")
    other = GroundedModel.from_pretrained(build(family), tmp_path / "one", model.vision, tokenizer())
    other.save_pretrained(tmp_path / "two")
    for file in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    inputs = model.prepare(PROMPTS)
    assert torch.equal(model(**inputs).logits, other(**inputs).logits)
    assert torch.equal(model.embed_text(PROMPTS), other.embed_text(PROMPTS))
    assert other.get_nb_trainable_parameters()[0] == 0 and model.get_nb_trainable_parameters()[0] > 0


@torch.no_grad()
def test_ret_states_are_those_of_the_sequence_without_cache(family):
    model = grounded(family)
    index = make_index(model)
    answer = model.generate([["w9", picture(0)]], index, ret_bias=50.0, max_new_tokens=1)[0]
    query = model.embed_text([["w9", picture(0)]])
    best = index.search(query, 1)
    assert answer.parts[0].id == index.ids[int(best.positions)]
    assert answer.parts[0].score == pytest.approx(float(best.scores), abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        dict(num_beams=3),
        dict(num_beams=2, num_return_sequences=2),
        dict(do_sample=True, temperature=0.7, top_k=20, top_p=0.9),
        dict(do_sample=True, num_return_sequences=3),
        dict(repetition_penalty=1.3, no_repeat_ngram_size=2),
        dict(return_dict_in_generate=True, output_scores=True),
        dict(cache_implementation="static"),
        dict(bad_words_ids=[[5], [6]]),
    ],
    ids=lambda options: "-".join(options),
)
def test_every_way_to_generate(options):
    model = grounded("llama_untied")
    answers = model.generate(PROMPTS, make_index(model), max_new_tokens=6, ret_bias=4.0, **options)
    assert len(answers) == len(PROMPTS) * options.get("num_return_sequences", 1)
    assert all(answer.parts for answer in answers)


@torch.no_grad()
def test_streamers_and_criteria_are_transformers_own(capsys):
    model = grounded("gpt2")
    streamer = TextStreamer(model.tokenizer, skip_prompt=True)
    stop = StoppingCriteriaList([lambda ids, scores, **kw: torch.ones(len(ids), dtype=torch.bool)])
    answer = model.generate(["w4"], suppress_tokens=[100], streamer=streamer, stopping_criteria=stop)[0]
    assert len(answer.text.split()) <= 1 and capsys.readouterr().out.strip() == answer.text.strip()


@torch.no_grad()
def test_images_per_ret_maximum_and_missing_index():
    model = grounded("llama_untied")
    options = dict(ret_bias=100.0, max_new_tokens=3, min_new_tokens_between_rets=0)
    small = make_index(model, 2)
    pictures = lambda **more: [p.id for p in model.generate("w4", **more, **options)[0].images]  # noqa: E731
    assert sorted(pictures(index=small, images_per_ret=5)) == ["p0", "p1"]
    assert len(pictures(index=make_index(model), max_images=1)) == 1
    assert len(set(pictures(index=make_index(model)))) == 3
    assert model.generate("w4", max_images=2, **options)[0].images == (RetrievedImage(), RetrievedImage())
    assert not model.generate("w4", max_images=0, **options)[0].images


@torch.no_grad()
def test_log_likelihood_is_the_sum_of_its_tokens():
    model = grounded("qwen2_tied")
    inputs = model.prepare([["w9", picture(0), "w5 w6[RET]"]])
    logits = torch.log_softmax(model(**inputs).logits[0], -1)
    wanted = sum(logits[i - 1, inputs["input_ids"][0, i]] for i in (-3, -2, -1))
    got = model.log_likelihood([["w9", picture(0)]], ["w5 w6[RET]"])
    assert torch.allclose(got, wanted, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT reads what transformers renamed
def test_a_peft_model_is_grounded_where_it_computes():
    from peft import LoraConfig, get_peft_model

    lm = get_peft_model(build("llama_untied"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model = grounded(lm=lm)
    assert model.generate(PROMPTS, ret_bias=100.0, **GREEDY)[1].images
    assert not any(p.requires_grad for p in lm.parameters())
    model.unground()
    assert any(p.requires_grad for p in lm.parameters())


def test_bad_input_is_named_and_changes_nothing(tmp_path):
    lm, words, eye = build("opt_projected"), tokenizer(), Eye()
    before = state_of(lm)
    words_with_ret = tokenizer()
    words_with_ret.add_tokens(["[RET]"])
    for arguments, match in [
        ((nn.Linear(2, 2), eye, words), "causal"),
        ((lm, eye, None), "tokenizer"),
        ((lm, eye, words_with_ret), "already"),
        ((lm, nn.Embedding(3, 3), words), "features"),
        ((lm, 3, words), "vision_encoder"),
    ]:
        with pytest.raises(GroundingError, match=match):
            ground(*arguments, image_processor)
        assert_same_state(before, state_of(lm))
    with pytest.raises(GroundingValueError, match="image_processor"):
        ground(lm, eye, words)
    with pytest.raises(GroundingTypeError, match="GroundingConfig"):
        ground(lm, eye, words, image_processor, {"num_visual_tokens": 1})
    grounded("llama_untied").save_pretrained(tmp_path)
    with pytest.raises(GroundingValueError, match=r"\(6, 32\)|\(12, 16\)|\(16"):
        GroundedModel.from_pretrained(lm, tmp_path, eye, words, image_processor)
    with pytest.raises(GroundingValueError, match="vision_encoder="):
        GroundedModel.from_pretrained(lm, tmp_path, None, words)
    with pytest.raises(GroundingError, match="no local folder"):
        GroundedModel.from_pretrained(lm, tmp_path / "none", eye, words, image_processor, local_files_only=True)
    assert_same_state(before, state_of(lm))


def test_bad_calls_are_named():
    model = grounded(lm=build("gpt2", n_positions=16))
    for call, match in [
        (lambda: model.generate([]), "empty"),
        (lambda: model.generate("w4 " * 17), "context"),
        (lambda: model.generate("w4", index=3), "ImageIndex"),
        (lambda: model.generate("w4", index=ImageIndex(torch.eye(3))), "width 3"),
        (lambda: model.generate("w4", images_per_ret=0), "images_per_ret"),
        (lambda: model.embed_text([" "]), "no tokens"),
        (lambda: model.embed_images([]), "no images"),
        (lambda: model.log_likelihood(["w4"], ["w4", "w5"]), "continuations"),
        (lambda: model(torch.ones(1, 2, dtype=torch.long), labels=torch.ones(1, 2)), "labels"),
        (lambda: model.prepare(3), "int"),
    ]:
        with pytest.raises(GroundingError, match=match):
            call()
    with model.disable_adapter(), pytest.raises(GroundingStateError, match="disabled"):
        model.generate([[picture()]])


def test_the_door_is_small_and_lazy():
    import visual_ground

    assert all(hasattr(visual_ground, name) for name in visual_ground.__all__)
    assert isinstance(GroundingConfig(), visual_ground.GroundingConfig)
    with pytest.raises(AttributeError, match="nothing"):
        visual_ground.nothing  # noqa: B018
