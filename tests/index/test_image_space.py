"""An index knows the adapter and encoder that it was built with, and is refused with others."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.tiny import Eye, build, image_processor, picture, tokenizer
from visual_ground import GroundedModel, GroundingConfig, ImageIndex, ground, transfer
from visual_ground.errors import GroundingFileError, GroundingValueError
from visual_ground.index.engines.exact import ExactIndex
from visual_ground.index.files import ENTRIES_FILE
from visual_ground.index.publishing import publishable
from visual_ground.indexing.build import BuildOptions, build_index
from visual_ground.terminal.conversation import Conversation
from visual_ground.vision.identity import ImageSpace

PICTURES = [picture(i) for i in range(3)]


def another(seed, eye=None):
    """Return a model of the same widths whose image layer, or encoder too, has other weights."""
    lm, config = build("llama_untied"), GroundingConfig(retrieval_dim=6, image_prompt="w7 {image} w8")
    torch.manual_seed(seed)
    return ground(lm, Eye() if eye is None else eye, tokenizer(), image_processor, config).eval()


@pytest.fixture(scope="module")
def ours():
    return another(1)


@pytest.fixture(scope="module")
def index(ours):
    return ImageIndex.build(ours, PICTURES)


def with_another_layer(model):
    return another(2, model.vision.model)


def with_another_encoder(model):
    other = another(3)
    other.adapter.load_state_dict(model.adapter.state_dict())
    return other


@pytest.mark.parametrize("change", [with_another_layer, with_another_encoder])
def test_an_index_of_another_adapter_or_encoder_is_refused_wherever_it_is_used(change, ours, index, tmp_path):
    from visual_ground.server.http import create_app

    index.save_pretrained(tmp_path / "index")
    other, loaded = change(ours), ImageIndex.from_pretrained(tmp_path / "index")
    for used in (index, loaded):
        ours.generate("w4", used, max_new_tokens=1)
        for use in (
            lambda used=used: other.generate("w4", used, max_new_tokens=1),
            lambda used=used: list(other.stream("w4", used, max_new_tokens=1)),
            lambda used=used: Conversation(other, used, {}),
            lambda used=used: create_app(other, used),
            lambda used=used: used.merge(ImageIndex.build(other, PICTURES, ids=["a", "b", "c"])),
        ):
            with pytest.raises(GroundingValueError, match="was built with"):
                use()
    assert len(index) == 3


def test_the_error_names_both_adapters(ours, tmp_path):
    ours.save_pretrained(tmp_path / "one")
    index = ImageIndex.build(ours, PICTURES)
    other = another(2)
    with pytest.raises(GroundingValueError, match=r"one' with an encoder without a name, and this model is an adapter"):
        other.generate("w4", index)
    assert str(tmp_path / "one") in index.info()["built_with"]


def test_a_width_that_does_not_fit_is_said_with_both_encoders(ours):
    index = ImageIndex.build(another(5), PICTURES)
    index._state = replace(index._state, engine=ExactIndex(torch.eye(7)[:3]))
    with pytest.raises(
        GroundingValueError, match="width 7, built with .* an encoder without a name; this model is .* width 6"
    ):
        ours.generate("w4", index)
    with pytest.raises(GroundingValueError, match="The index was built with .* an encoder without a name"):
        index.add(torch.eye(6)[:1])


def test_an_index_fits_the_adapter_however_it_comes_back(ours, index, tmp_path):
    ours.save_pretrained(tmp_path / "adapter")
    again = GroundedModel.from_pretrained(
        build("llama_untied"), tmp_path / "adapter", ours.vision.model, tokenizer(), image_processor
    )
    index.check_model(again.image_space)
    index.check_model(again.to(torch.bfloat16).image_space)
    again.to(torch.float32)
    index.check_model(again.double().image_space)


def test_an_index_fits_an_adapter_that_was_moved_to_another_lm(ours, index):
    from visual_ground.transferring.collect import collect_anchors

    anchors = collect_anchors([{"image": picture(i), "caption": f"w{i + 4} w5"} for i in range(8)], ours.vision)
    moved = transfer(ours, build("gpt2"), tokenizer(), anchors)
    index.check_model(moved.image_space)


def test_the_image_layer_is_read_anew_each_time(ours, index):
    other = another(4, ours.vision.model)
    other.adapter.load_state_dict(ours.adapter.state_dict())
    index.check_model(other.image_space)
    with torch.no_grad():
        other.adapter.image_retrieval_projection.weight.neg_()
    with pytest.raises(GroundingValueError):
        index.check_model(other.image_space)


def test_vectors_alone_are_of_no_known_adapter_and_pass(ours):
    index = ImageIndex(torch.eye(6))
    ours.generate("w4", index, max_new_tokens=1)
    index.merge(ImageIndex.build(ours, PICTURES, ids=["a", "b", "c"]))
    with_another_layer(ours).generate("w4", index, max_new_tokens=1)
    empty = ImageIndex(torch.empty(0, 6))
    empty.merge(ImageIndex.build(ours, PICTURES))
    with pytest.raises(GroundingValueError):
        with_another_layer(ours).generate("w4", empty)


def test_a_build_is_not_continued_with_another_adapter(ours, tmp_path):
    picture(0).save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes(b"no image")
    options = BuildOptions(batch_size=1, part_size=1, progress=False)

    class Stops:
        vision, image_space = ours.vision, ours.image_space

        def embed_images(self, *, image_features):
            raise KeyboardInterrupt

    source, folder = [str(tmp_path / "0.png")], tmp_path / "index"
    with pytest.raises(KeyboardInterrupt):
        build_index(Stops(), source, folder, options)
    with pytest.raises(GroundingValueError, match="unfinished build"):
        build_index(with_another_layer(ours), source, folder, options)
    build_index(ours, source, folder, options)
    with pytest.raises(GroundingValueError):
        ImageIndex.from_pretrained(folder).check_model(with_another_layer(ours).image_space)


def test_what_is_published_names_no_folder_of_this_machine(ours, tmp_path):
    ours.save_pretrained(tmp_path / "one")
    index = ImageIndex.build(ours, PICTURES)
    space = publishable(index._state, PICTURES, copy_images=False).space
    assert str(tmp_path) not in str(space) and space.is_same(ours.image_space)


@pytest.mark.parametrize(
    "space",
    [
        3,
        {},
        {"vectors": [[1.0] * 6]},
        {"vectors": [[1.0] * 6, [1.0] * 5]},
        {"vectors": [["a"] * 6] * 2},
        {"vectors": [[1.0] * 6] * 2, "adapter": 3},
        {"vectors": [[1.0] * 6] * 2, "more": "a"},
    ],
)
def test_a_damaged_space_is_refused(space, index, tmp_path):
    index.save_pretrained(tmp_path)
    about = json.loads((tmp_path / ENTRIES_FILE).read_text())
    (tmp_path / ENTRIES_FILE).write_text(json.dumps({**about, "image_space": space}))
    with pytest.raises(GroundingFileError, match="image space"):
        ImageIndex.from_pretrained(tmp_path)


unit = st.integers(0, 2**32 - 1).map(
    lambda seed: F.normalize(torch.randn(2, 64, generator=torch.Generator().manual_seed(seed)), dim=-1)
)


@given(unit, unit, st.floats(0, 1), st.integers(0, 100))
@settings(max_examples=50)
def test_a_space_is_itself_within_rounding_and_is_no_other_also_where_vectors_are_in_one_cone(one, two, bias, seed):
    noise = torch.randn(2, 64, generator=torch.Generator().manual_seed(seed)) * 2e-3
    common = torch.nn.functional.one_hot(torch.tensor([0, 0]), 64).float() * 2 * bias
    one, two = F.normalize(one + common, dim=-1), F.normalize(two + common, dim=-1)
    space = ImageSpace.of(one)
    assert space.is_same(ImageSpace.of(F.normalize(one + noise, dim=-1)))
    assert not space.is_same(ImageSpace.of(two)) or torch.equal(one, two)
    assert ImageSpace.from_dict(json.loads(json.dumps(space.to_dict())), 64) == space
