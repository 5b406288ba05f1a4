"""A fitted adapter finds its pairs; what cannot be fitted changes nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.tiny import FAMILIES, build, grounded, picture, tokenizer
from visual_ground import GroundedModel, GroundingError, GroundingTrainer, GroundingTrainingArguments, fit
from visual_ground.adapter.adapter import Adapter
from visual_ground.indexing.foreign import read_embeddings
from visual_ground.lm.base.loading import multiplies_bfloat16
from visual_ground.transferring.image_side import ImageSide

ROWS = [{"image": picture(i), "caption": f"w{10 + i} w{20 + 2 * i}"} for i in range(12)]


def arguments(tmp_path):
    return GroundingTrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, prefix_cache_gb=0.1)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_pairs_find_each_other_and_the_lm_stays_as_it_was(family, tmp_path):
    lm = build(family)
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    model = grounded(lm=lm, retrieval_prompt="w90 w91")
    fit(model, ROWS, arguments(tmp_path))
    assert all(torch.equal(before[name], value) for name, value in lm.state_dict().items())
    texts, images = model.embed_text([row["caption"] for row in ROWS]), model.embed_images([r["image"] for r in ROWS])
    right = float(((texts @ images.T).argmax(1) == torch.arange(len(ROWS))).float().mean())
    # A random OPT's states hardly depend on what was read.
    assert torch.isfinite(texts).all() and (right >= 0.5 or family == "opt_projected")
    model.save_pretrained(tmp_path / "adapter")
    again = GroundedModel.from_pretrained(build(family), tmp_path / "adapter", model.vision, tokenizer())
    assert torch.equal(again.embed_text(["w10 w20"]), model.eval().embed_text(["w10 w20"]))
    assert "closed form" in (tmp_path / "adapter" / "README.md").read_text()


def test_in_the_encoders_own_space_images_keep_its_vectors_and_texts_learn_to_find_them(tmp_path):
    model = grounded(retrieval_space="encoder", retrieval_prompt="w90 w91")
    pictures = [row["image"] for row in ROWS]
    own = F.normalize(model.vision.encode(pictures), dim=-1)
    assert model.config.retrieval_dim == model.vision.feature_dim == own.shape[1]
    fit(model, ROWS, arguments(tmp_path))
    assert torch.equal(model.embed_images(pictures), own)
    assert torch.allclose(ImageSide.of(model).embed(model.vision.encode(pictures)), own, atol=1e-5)
    texts = model.embed_text([row["caption"] for row in ROWS])
    assert float(((texts @ own.T).argmax(1) == torch.arange(len(ROWS))).float().mean()) >= 0.5
    options = {"max_steps": 1, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none"}
    steps = GroundingTrainingArguments(output_dir=str(tmp_path / "out"), **options)
    GroundingTrainer(model, steps, ROWS).train()
    assert torch.equal(model.embed_images(pictures), own)
    model.save_pretrained(tmp_path / "adapter")
    again = GroundedModel.from_pretrained(build("llama_untied"), tmp_path / "adapter", model.vision, tokenizer())
    assert torch.equal(again.embed_text(["w10 w20"]), model.eval().embed_text(["w10 w20"]))
    assert torch.equal(again.embed_images(pictures), own)
    np.save(tmp_path / "embeddings.npy", model.vision.encode(pictures).numpy())  # As another tool would have them.
    found = read_embeddings(tmp_path / "embeddings.npy", dim=again.config.retrieval_dim).search(texts, 1)
    assert torch.equal(found.positions[:, 0], (texts @ own.T).argmax(1))
    with pytest.raises(GroundingError, match="12 wide"):
        Adapter(replace(model.config, retrieval_dim=6), 4, 12, (4,), 4, False)


def test_fitted_twice_it_is_the_same(tmp_path):
    once, twice = grounded(), grounded()
    fit(once, ROWS, arguments(tmp_path))
    fit(twice, ROWS[:6], arguments(tmp_path))
    fit(twice, ROWS, arguments(tmp_path))
    for name, value in once.adapter.state_dict().items():
        assert torch.allclose(value, twice.adapter.state_dict()[name], atol=1e-4), name


def test_it_says_how_far_it_is(tmp_path, capfd):
    fit(grounded(), ROWS, arguments(tmp_path))
    said = capfd.readouterr().err
    assert "fit: captions and requests" in said and "start values: image tokens" in said
    fit(grounded(), ROWS, GroundingTrainingArguments(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True))
    assert "fit:" not in capfd.readouterr().err


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_in_mixed_precision_the_fit_is_nearly_the_same(family, tmp_path):
    vectors = []
    for bf16 in (False, True):
        model = grounded(family, retrieval_prompt="w90 w91")
        args = GroundingTrainingArguments(
            output_dir=str(tmp_path / "out"), use_cpu=True, prefix_cache_gb=0.1, bf16=bf16, feature_cache=str(tmp_path)
        )
        fit(model, ROWS, args)
        vectors.append(model.embed_text([row["caption"] for row in ROWS]))
    # Without instructions for bfloat16, products are added in another order: 0.93 for one family.
    least = 0.95 if multiplies_bfloat16() else 0.9
    assert not torch.equal(*vectors) and float((vectors[0] * vectors[1]).sum(-1).mean()) > least


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([dict(row, group="one") for row in ROWS], "of 1 different groups"),
        (
            [dict(row, caption="w4", request="w5", group=i) for i, row in enumerate(ROWS)],
            "All texts have the same features",
        ),
        (
            [dict(caption=row["caption"], image_features=[1.0] * 12) for row in ROWS],
            "All images have the same features",
        ),
        ([dict(caption=row["caption"], image_features=[float("nan")] * 12) for row in ROWS], "NaN"),
        ([dict(row, caption=" ") for row in ROWS], "caption"),
        ([], "no rows|empty|has 0"),
    ],
    ids=["one group", "constant texts", "constant images", "NaN", "no text", "no rows"],
)
def test_what_cannot_be_fitted_is_named_and_changes_nothing(rows, words, tmp_path):
    model = grounded()
    before = {name: tensor.clone() for name, tensor in model.adapter.state_dict().items()}
    with pytest.raises(GroundingError, match=words):
        fit(model, rows, arguments(tmp_path))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.adapter.state_dict().items())


@pytest.mark.parametrize(
    ("model", "pairs", "words"),
    [
        (lambda: 3, ROWS, "GroundedModel, got int"),
        (lambda: grounded(scaling="none"), ROWS, "scaling"),
        (lambda: grounded().requires_grad_(False), ROWS, "frozen"),
    ],
)
def test_what_fit_does_not_take_is_said(model, pairs, words):
    with pytest.raises(GroundingError, match=words):
        fit(model(), pairs)
