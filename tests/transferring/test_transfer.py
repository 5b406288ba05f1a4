"""A transferred adapter: the same image side, so the same index files; the rest is fitted, and nothing else changes."""

import pytest
import torch

import visual_ground
from tests.tiny import build, grounded, image_processor, picture, tokenizer
from visual_ground import GroundedModel, GroundingConfig, ImageIndex, ground, transfer
from visual_ground.adapter.adapter import IMAGE_SIDE
from visual_ground.adapter.anchors import Anchors
from visual_ground.adapter.initialization import standardize_features
from visual_ground.cli.main import main
from visual_ground.errors import GroundingFileError, GroundingValueError
from visual_ground.evaluation.retrieval import retrieval_recall
from visual_ground.transferring.collect import collect_anchors
from visual_ground.transferring.fit import fit_image_tokens, fit_states
from visual_ground.transferring.image_side import ImageSide

PICTURES = [picture(i) for i in range(24)]
CAPTIONS = [f"w{10 + i} w{50 + i} w9" for i in range(24)]


def source(scaling="embedding", **config):
    """Return a grounded model whose image side has been given statistics, as training does, and its anchors."""
    model = grounded("llama_untied", scaling=scaling, **config)
    anchors = collect_anchors(
        [{"image": p, "caption": c} for p, c in zip(PICTURES, CAPTIONS, strict=True)], model.vision
    )
    if scaling == "embedding":
        standardize_features(model.adapter, anchors.features)
    model.active.anchors = anchors
    return model


@pytest.mark.parametrize("scaling", ["embedding", "none"])
@pytest.mark.parametrize("family", ["gemma2_scaled_capped", "opt_projected"])
def test_the_image_side_stays_and_the_rest_is_fitted(family, scaling, tmp_path):
    old = source(scaling, num_visual_tokens=2)
    before = {name: value.clone() for name, value in old.adapter.state_dict().items()}
    index = ImageIndex.build(old, PICTURES)
    index.save_pretrained(tmp_path / "index")
    lm = build(family)
    weights = {name: value.clone() for name, value in lm.state_dict().items()}
    new = transfer(old, lm, tokenizer())
    assert all(torch.equal(value, old.adapter.state_dict()[name]) for name, value in before.items())
    assert all(torch.equal(value, lm.state_dict()[name]) for name, value in weights.items())
    for name in IMAGE_SIDE:
        assert torch.equal(new.adapter.state_dict()[name], before[name])
    assert torch.equal(new.embed_images(PICTURES), ImageIndex.from_pretrained(tmp_path / "index").vectors)
    assert not any(p.requires_grad for p in new.adapter.image_retrieval_projection.parameters())


@torch.no_grad()
def text_states(model, texts):
    """Return the hidden states at a `[RET]` after each text, one (n, width) per text layer."""
    batch = model.processor.batch(model.processor.encode_queries(texts))
    ids = batch["input_ids"]
    last = torch.arange(1, len(ids) + 1) * ids.shape[1] - 1
    return model.frozen_lm.hidden_states(ids, batch["attention_mask"], last, model.config.text_layers)


def features_of_texts(lm, count, scaling):
    """Return captions, and features of images that are all that the LM's states after these captions tell."""
    texts = [f"w{10 + i % 13} w{30 + i % 17} w{50 + i % 19}" for i in range(count)]
    torch.manual_seed(0)
    reader = ground(lm, source(scaling).vision, tokenizer(), config=GroundingConfig(scaling=scaling))
    states = reader.adapter.scale_states(text_states(reader, texts))[0]
    reader.unground()
    torch.manual_seed(1)
    return texts, (states - states.mean(0)) / states.std(0) @ torch.randn(states.shape[1], 12) / 3


@pytest.mark.parametrize("scaling", ["embedding", "none"])
def test_the_closed_form_finds_images_of_captions_that_are_no_anchors(scaling):
    lm = build("qwen2_tied")
    texts, features = features_of_texts(lm, 120, scaling)
    anchors = Anchors([[text] for text in texts[:80]], features[:80])
    torch.manual_seed(0)
    new = transfer(ImageSide.of(source(scaling)), lm, tokenizer(), anchors)
    assert retrieval_recall(new, texts[80:], features[80:])["text_to_image"]["r5"] > 90  # chance is 12


def test_several_text_layers_are_fitted_together():
    new = transfer(ImageSide.of(source()), build("gpt2"), tokenizer(), text_layers=(-1, 1), num_visual_tokens=3)
    assert new.config.text_layers == (-1, 1) and new.config.num_visual_tokens == 3
    states = new.adapter.scale_states(text_states(new, CAPTIONS))
    side = ImageSide.of(new)
    fitted = fit_states(torch.cat(states, -1), side.embed(new.active.anchors.features), new.active.anchors.images)
    mapped = torch.nn.functional.normalize(fitted(torch.cat(states, -1)), dim=-1)
    assert torch.allclose(new.embed_text(CAPTIONS), mapped, atol=1e-3)


def test_an_image_side_without_statistics_stays_too():
    old = source()
    for name, value in (("feature_mean", 0.0), ("feature_std", 1.0)):
        old.adapter.state_dict()[name].fill_(value)
    new = transfer(ImageSide.of(old), build("gpt2"), tokenizer())
    assert torch.equal(new.embed_images(PICTURES), old.embed_images(PICTURES))


@torch.no_grad()
def test_image_tokens_are_near_their_captions_embeddings():
    model = source()
    fit_image_tokens(model, model.active.anchors)
    table = model.lm.get_input_embeddings().weight
    # The last word is every caption's, and tells no image from others.
    captions = torch.stack([table[model.processor.encode_text(text)[:-1]].mean(0) for text in CAPTIONS])
    rows = model.active.image_tokens(image_features=model.active.anchors.features)
    assert torch.allclose(rows.mean(0), model.adapter.embedding_mean, atol=1e-5)
    own = torch.nn.functional.cosine_similarity(rows - rows.mean(0), captions - captions.mean(0)).mean()
    other = torch.nn.functional.cosine_similarity(rows - rows.mean(0), (captions - captions.mean(0)).roll(1, 0)).mean()
    assert own > other + 0.3


def test_saved_with_anchors_it_moves_without_its_old_lm(tmp_path):
    old = source()
    old.save_pretrained(tmp_path)
    side = ImageSide.load(tmp_path)
    assert side.anchors.captions == old.active.anchors.captions
    side = ImageSide(side.config, side.tensors, old.vision, side.anchors)
    new = transfer(side, build("gpt2"), tokenizer())
    assert torch.equal(new.embed_images(PICTURES), old.embed_images(PICTURES))
    assert torch.allclose(
        side.embed(old.active.anchors.features), old.embed_images(image_features=old.active.anchors.features)
    )
    new.save_pretrained(tmp_path / "new")
    again = GroundedModel.from_pretrained(build("gpt2"), tmp_path / "new", old.vision, tokenizer(), image_processor)
    assert torch.equal(again.embed_text(CAPTIONS), new.eval().embed_text(CAPTIONS))
    assert again.active.anchors.captions == old.active.anchors.captions


def test_an_adapter_for_an_lm_of_other_widths_says_how_to_move_it(tmp_path):
    old, lm = source(), build("gpt2", n_embd=64)
    old.save_pretrained(tmp_path / "with")
    with pytest.raises(GroundingValueError) as refused:
        GroundedModel.from_pretrained(lm, tmp_path / "with", old.vision, tokenizer(), image_processor)
    line = f'visual_ground.transfer("{tmp_path / "with"}", lm)'
    assert line in str(refused.value) and "has the anchors.safetensors" in str(refused.value)
    assert "ret_input: the file has (32,), this model needs (64,)" in str(refused.value)
    words = {
        "lm": lm,
        "visual_ground": visual_ground,
        "given": {"vision_encoder": old.vision, "tokenizer": tokenizer()},
    }
    moved = eval(line.replace(", lm)", ", lm, **given)"), words)
    assert torch.equal(moved.embed_images(PICTURES), old.embed_images(PICTURES))
    moved.unground()
    old.active.anchors = None
    old.save_pretrained(tmp_path / "without")
    lm.config._name_or_path = "some/lm"
    with pytest.raises(
        GroundingValueError, match='"some/lm", anchors=anchors.*no anchors.safetensors.*collect_anchors'
    ):
        GroundedModel.from_pretrained(lm, tmp_path / "without", old.vision, tokenizer(), image_processor)
    # Another vision encoder is no other LM.
    with pytest.raises(GroundingValueError) as refused:
        GroundedModel.from_pretrained(
            lm,
            tmp_path / "with",
            torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5)),
            tokenizer(),
            image_processor,
        )
    assert "transfer" not in str(refused.value)


def test_one_call_from_names_to_a_grounded_model(tmp_path):
    from tests.golden_parts import saved_parts

    lm, vision, table = saved_parts(tmp_path)
    old = ground(lm, vision, config=GroundingConfig(retrieval_dim=6))
    old.active.anchors = collect_anchors(
        [{"image": str(tmp_path / "0.png"), "caption": "the number 0"}] * 3, old.vision
    )
    old.save_pretrained(tmp_path / "old")
    old.active.provenance["vision_revision"] = "abc"
    model = visual_ground.transfer(tmp_path / "old", lm)
    image = [str(tmp_path / "1.png")]
    assert torch.equal(model.embed_images(image), old.embed_images(image))
    assert transfer(old, lm).active.metadata.provenance["vision_revision"] == "abc"


def test_the_public_function_is_not_shadowed_by_its_folder():
    import visual_ground.transferring.fit

    assert visual_ground.transfer is transfer and callable(transfer)


def test_what_cannot_be_transferred_is_said_and_leaves_the_lm_alone(tmp_path):
    old, lm = source(), build("gpt2")
    for options, words in [
        (dict(anchors=Anchors([["w9"]], torch.zeros(1, 5))), "5 features"),
        (dict(retrieval_dim=7), "retrieval_dim"),
        (dict(scaling="none"), "scaling"),
    ]:
        with pytest.raises(GroundingValueError, match=words):
            transfer(ImageSide.of(old), lm, tokenizer(), **options)
    old.active.anchors = None
    with pytest.raises(GroundingValueError, match="without anchors.*collect_anchors"):
        transfer(ImageSide.of(old), lm, tokenizer())
    with pytest.raises(GroundingFileError):
        ImageSide.load(tmp_path)
    assert not lm.get_input_embeddings()._forward_hooks


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_command_line(tmp_path, capsys):
    from tests.golden_parts import saved_parts

    lm, vision, table = saved_parts(tmp_path)
    ground(lm, vision, config=GroundingConfig(retrieval_dim=6)).save_pretrained(tmp_path / "old")
    out = tmp_path / "new"
    assert main(["transfer", str(tmp_path / "old"), lm, "--output", str(out)]) == 2
    assert "without anchors" in capsys.readouterr().err and not out.exists()
    command = ["transfer", str(tmp_path / "old"), lm, "--output", str(out), "--dataset", table]
    assert main(command) == 0
    model = GroundedModel.from_pretrained(lm, out)
    assert len(model.active.anchors) == 8
    assert main(["transfer", str(out), lm, "--output", str(tmp_path / "third")]) == 0
