"""A fitted adapter finds its pairs; what cannot be fitted changes nothing."""

import pytest
import torch

from tests.tiny import FAMILIES, build, grounded, picture, tokenizer
from visual_ground import GroundedModel, GroundingError, GroundingTrainingArguments, fit

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


def test_fitted_twice_it_is_the_same(tmp_path):
    once, twice = grounded(), grounded()
    fit(once, ROWS, arguments(tmp_path))
    fit(twice, ROWS[:6], arguments(tmp_path))
    fit(twice, ROWS, arguments(tmp_path))
    for name, value in once.adapter.state_dict().items():
        assert torch.allclose(value, twice.adapter.state_dict()[name], atol=1e-4), name


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
    assert not torch.equal(*vectors) and float((vectors[0] * vectors[1]).sum(-1).mean()) > 0.95


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
