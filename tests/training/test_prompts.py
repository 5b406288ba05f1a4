"""Composed retrieval: prompts of texts and images are trained on and fitted to, and bad ones are named."""

import datasets
import pytest
import torch

from tests.tiny import FAMILIES, grounded, picture
from tests.training.runs import TEMPLATE, arguments
from visual_ground import GroundingError, GroundingTrainer, fit
from visual_ground.training.data.columns import Columns
from visual_ground.training.data.examples import ExampleCollator, ExampleDataset
from visual_ground.training.losses.compute_plan import choose_prefix_cache
from visual_ground.training.losses.prompts import Asked
from visual_ground.training.losses.retrieval import plain_retrieval

COUNT = 12
CAPTIONS = [f"w{10 + i} w{20 + i}" for i in range(COUNT)]


def forms(path):
    """Return prompts of every kind about the picture at a path."""
    text, image = {"type": "text", "text": "w30 w31"}, {"type": "image", "image": str(path)}
    return {
        "list": [str(path), "w30 w31"],
        "typed": [text, image],
        "several": ["w30", picture(90), "w31", picture(91)],
        "chat": [
            {"role": "user", "content": [text, image]},
            {"role": "assistant", "content": "w6"},
            {"role": "user", "content": "w31"},
        ],
        "text": "w30 w31",
    }


@pytest.fixture
def rows(tmp_path):
    """Return rows without a prompt and with one of each kind, in turn."""
    found = []
    for i, caption in enumerate(CAPTIONS):
        picture(50 + i).save(path := tmp_path / f"{i}.png")
        row = {"image": picture(i), "caption": caption}
        prompt = [None, *forms(path).values()][i % 6]
        found.append(row if prompt is None else {**row, "prompt": prompt})
    return found


def chatty(family="llama_untied", **config):
    model = grounded(family, retrieval_prompt="w90 w91", **config)
    model.tokenizer.chat_template = TEMPLATE
    return model


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_state_that_is_trained_is_the_one_that_embed_text_reads(family, rows):
    model = chatty(family, num_visual_tokens=2)
    dataset = ExampleDataset(rows, sample=False)
    batch = ExampleCollator(model, concat_captions_prob=0.0)([dataset[i] for i in range(COUNT)])
    features = model.vision(batch["prompt_pixels"])
    wanted = model.embed_text([row.get("prompt", row["caption"]) for row in rows])
    for size in (None, 3):
        output = Asked.of(model, batch["retrieval"], features).run(None, size)
        assert torch.allclose(output.vectors, wanted, atol=1e-4)
    states = Asked.of(model, batch["retrieval"], features).states(None)
    assert torch.allclose(model.active.embed_states(states), wanted, atol=1e-4)
    whole = plain_retrieval(model, batch["retrieval"], model.adapter.image_tokens(features))
    assert torch.allclose(whole.loss, output.loss, rtol=1e-4)


def test_kept_prefixes_and_prompts_are_one_batch(rows):
    model = chatty()
    dataset = ExampleDataset(rows, sample=False)
    batch = ExampleCollator(model, concat_captions_prob=0.0)([dataset[i] for i in range(COUNT)])
    asked = Asked.of(model, batch["retrieval"], model.vision(batch["prompt_pixels"]))
    cache = choose_prefix_cache(model, asked.texts, 2**24)
    plain, kept = asked.run(None), asked.run(cache)
    assert cache is not None and torch.allclose(plain.vectors, kept.vectors, atol=1e-4)
    assert torch.allclose(plain.loss, kept.loss, rtol=1e-4)


def test_images_and_features_must_be_as_many(rows):
    model = chatty()
    dataset = ExampleDataset(rows, sample=False)
    batch = ExampleCollator(model)([dataset[i] for i in range(COUNT)])
    with pytest.raises(GroundingError, match="have 10 images, and there are features of 1"):
        Asked.of(model, batch["retrieval"], torch.zeros(1, 12))


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("streamed", [False, True])
def test_prompts_train_the_image_tokens_that_they_read(cached, streamed, rows, tmp_path):
    if streamed:
        # A table has one type for a column.
        picture(99).save(path := tmp_path / "asked.png")
        rows = [dict(row, image={"bytes": None, "path": str(path)}, prompt=forms(path)["typed"]) for row in rows]
        rows = datasets.Dataset.from_list(rows).to_iterable_dataset()
    model = chatty()
    args = arguments(tmp_path / "run", cache_features=cached, caption_loss_scale=0.0, prefix_cache_gb=0.01)
    before = model.adapter.image_projection.weight.detach().clone()
    GroundingTrainer(model, args, rows).train()
    assert not torch.equal(before, model.adapter.image_projection.weight)


def test_fit_learns_what_the_prompts_ask_for(tmp_path):
    """Each picture is asked for by another picture and a word, and neither of these alone would find it."""
    model, rows = chatty(), []
    for i in range(6):
        for j in range(2):
            asked = [picture(50 + i), f"w{30 + j}"]
            rows.append({"image": picture(2 * i + j), "caption": f"w{10 + i} w{20 + j}", "prompt": asked})
    fit(model, rows, arguments(tmp_path))
    images = model.embed_images([row["image"] for row in rows])
    right = lambda prompts: (model.embed_text(prompts) @ images.T).argmax(1) == torch.arange(len(rows))  # noqa: E731
    composed = right([row["prompt"] for row in rows]).float().mean()
    alone = [right([row["prompt"][part] for row in rows]).float().mean() for part in (0, 1)]
    assert composed > max(alone)


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ([picture(1)], "its prompt has no text"),
        ([picture(1), " "], "its prompt has no text"),
        ([picture(1), "w4 [RET]"], "contains"),
        ([picture(1), {"type": "video", "video": "a.mp4"}], "its prompt cannot be read"),
        ([{"role": "user", "content": [{"type": "image"}]}], "its prompt cannot be read"),
        ([3, "w4"], "its prompt cannot be read"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_named_before_anything_happens(prompt, problem, rows, tmp_path):
    with pytest.raises(GroundingError, match=problem):
        GroundingTrainer(chatty(), arguments(tmp_path), [*rows, {**rows[0], "prompt": prompt}])


@pytest.mark.parametrize("cached", [True, False])
def test_a_prompt_with_an_unreadable_image_is_skipped_whole(cached, rows, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    bad = {**rows[0], "prompt": [str(tmp_path / "broken.png"), "w4"]}
    args = dict(cache_features=cached, max_steps=4)
    if cached:  # Else a thousand rows are waited for.
        with pytest.raises(GroundingError, match="row 0.* is not an image"):
            GroundingTrainer(chatty(), arguments(tmp_path / "one", **args), [bad, *rows])
    trainer = GroundingTrainer(chatty(), arguments(tmp_path / "two", max_skipped=0.5, **args), [bad, *rows])
    trainer.train()
    assert len(trainer.train_dataset) == len(rows) + (not cached)


def test_no_prompt_is_no_problem_and_captions_may_be_called_prompts():
    for nothing in (None, float("nan"), "", " ", []):
        assert Columns().problem_of({"image": 1, "caption": "w4", "prompt": nothing}) is None
        assert Columns().split_prompt({"prompt": nothing}) is None
    assert Columns(caption="prompt").split_prompt({"prompt": "w4"}) is None
    paths = Columns(folder="pictures").prompt_images({"prompt": ["a.png", "w4"]})
    assert [str(path) for path in paths] == ["pictures/a.png"]
