"""Every tokenizer habit: prompts read as the tokenizer would, ten steps lower a finite loss, answers come."""

import math

import pytest
import torch

from tests.lm.tokenizers_of_all_habits import HABITS, LINES, TEMPLATES, byte_level, metaspace
from tests.tiny import Eye, build, image_processor, picture
from visual_ground import GroundingTrainer, GroundingTrainingArguments, RetrievedImage, ground
from visual_ground.errors import GroundingError

ROWS = [{"image": picture(i), "caption": line} for i, line in enumerate(LINES)]
TURN = [{"role": "user", "content": "Show me a cat"}]


@pytest.fixture(params=sorted(HABITS))
def tokenizer(request, tmp_path):
    return HABITS[request.param](tmp_path)


def grounded(tokenizer, rows=0):
    """Ground a tiny LM with `rows` more embedding rows than the tokenizer has tokens."""
    size = max(tokenizer.get_vocab().values()) + 1 + rows
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
    special = {name: i if i is None or i < size else None for name, i in special.items()}
    lm = build("llama_untied", vocab_size=size, **special)
    return ground(lm, Eye(), tokenizer, image_processor)


def losses(model, folder, rows=ROWS):
    """Train ten steps on the same rows; return their losses."""
    args = GroundingTrainingArguments(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=len(rows),
        max_steps=10,
        learning_rate=3e-3,
        data_dependent_init=False,  # what a fitted start leaves does not fall in ten steps
        concat_captions_prob=0.0,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        logging_steps=1,
    )
    trainer = GroundingTrainer(model, args, rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("rows", [0, 7], ids=["as many rows", "more rows"])
def test_ten_steps_have_a_finite_and_falling_loss_and_answers_come(tokenizer, rows, tmp_path):
    model = grounded(tokenizer, rows)
    assert model.frozen_lm.vocabulary.ret_is_spare == bool(rows)
    history = losses(model, tmp_path)
    assert len(history) == 10 and all(map(math.isfinite, history))
    assert history[-1] < history[0] - 0.1
    model.eval()
    prompts = ["Show me a picture", ["What is", picture(1), " in it?"]]
    outs = model.generate(prompts, max_images=1, ret_bias=1e6, max_new_tokens=6, min_new_tokens=6)
    for out in outs:
        assert isinstance(out.parts[0], RetrievedImage) and len(out.parts) == 2
    scores = model.log_likelihood([["Image of", picture(1), ":"]] * 2, [" a cat", " two dogs"])
    assert torch.isfinite(scores).all() and torch.isfinite(model.embed_text(["a cat", LINES[1]])).all()


def test_text_is_read_as_the_tokenizer_reads_it(tokenizer):
    model = grounded(tokenizer)
    for text in (*LINES, "What is in it?"):
        special = {tokenizer.eos_token_id} - {tokenizer.bos_token_id}
        wanted = [i for i in tokenizer(text)["input_ids"] if i not in special]
        assert list(model.processor.encode(text).ids) == wanted
    assert tokenizer.decode(model.processor.encode_text(LINES[3]), skip_special_tokens=True).strip() == LINES[3]


def test_a_caption_after_its_prompt_is_one_space_away(tokenizer):
    encoder = grounded(tokenizer).processor
    whole = [*encoder.encode_text("Image:"), *encoder.encode_caption("a cat")]
    assert whole == tokenizer("Image: a cat", add_special_tokens=False)["input_ids"]
    pieces = [*encoder.encode_text("What is"), *encoder.continue_text(" in it?")]
    assert pieces == tokenizer("What is in it?", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_padded_on_the_side_that_is_asked_for(tokenizer, side):
    model = grounded(tokenizer).eval()
    prompts = ["a photo of a red cat on a green mat", "two"]
    batch = model.prepare(prompts, padding_side=side)
    last = batch["attention_mask"].sum(-1) - 1 if side == "right" else torch.full((2,), -1)
    together = model(**batch).logits[torch.arange(2), last]
    alone = torch.stack([model(**model.prepare([prompt])).logits[0, -1] for prompt in prompts])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_chat_is_read_as_the_tokenizer_s_template_says(tokenizer, template):
    tokenizer.chat_template = TEMPLATES[template]
    if tokenizer.bos_token is None and template == "bos by itself":
        tokenizer.chat_template = TEMPLATES["system role"]
    encoder = grounded(tokenizer).processor
    ids = list(encoder.encode(TURN).ids)
    wanted = tokenizer.apply_chat_template(TURN, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert ids == wanted
    if template == "bos by itself" and tokenizer.bos_token is not None:
        assert ids.count(tokenizer.bos_token_id) == 1
    system = [{"role": "system", "content": "Be brief"}, *TURN]
    if template == "no system role":
        with pytest.raises(GroundingError, match=r"system.*System role not supported"):
            encoder.encode(system)
    else:
        assert len(encoder.encode(system).ids) > len(ids)


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_chat_rows_train_too(template, tmp_path):
    tokenizer = metaspace(bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATES[template]
    rows = [dict(row, request="Show me one", question="What is it?") for row in ROWS]
    history = losses(grounded(tokenizer), tmp_path, rows)
    assert all(map(math.isfinite, history)) and history[-1] < history[0] - 0.1


def test_fewer_rows_than_tokens(tmp_path):
    """Tokens that were added to the tokenizer alone: PAD is not needed, and any other is an error that names it."""
    tokenizer = byte_level(eos_token="<|endoftext|>")
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<new>"]})
    model = grounded(tokenizer, rows=-2)
    assert model.frozen_lm.vocabulary.num_rows < model.frozen_lm.vocabulary.num_tokens <= model.ret_token_id
    assert model.processor.pad_token_id == tokenizer.eos_token_id
    history = losses(model, tmp_path)
    assert all(map(math.isfinite, history)) and history[-1] < history[0] - 0.1
    with pytest.raises(GroundingError, match="<new>.*rows"):
        model.prepare(["a <new> cat"])
    assert isinstance(model.eval().generate(["a cat"], ret_bias=1e6, max_new_tokens=2)[0].parts[0], RetrievedImage)
