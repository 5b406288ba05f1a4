"""Encoders of timm and open_clip with weights of one's own, by path, and the name that an adapter keeps of them."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

from tests.tiny import build, image_processor, picture, tokenizer
from visual_ground import GroundedModel, GroundingConfig, ground
from visual_ground.adapter.files import published
from visual_ground.errors import GroundingError, GroundingFileError, GroundingValueError
from visual_ground.storage.hub_names import rooted
from visual_ground.vision.encoder import VisionEncoder
from visual_ground.vision.loading import load_vision

NAME = "test_efficientnet"


@pytest.fixture
def saved(tmp_path):
    """Return a model of timm with random weights, and the names by which it is loaded from files."""
    torch.manual_seed(3)
    model = timm.create_model(NAME, pretrained=False).eval()
    folder = tmp_path / "my encoder"
    folder.mkdir()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    torch.save(state, folder / "model.pth")
    save_for_hf(model, folder, safe_serialization=True)
    names = [f"timm:{NAME}/{folder}/model.safetensors", f"timm:{NAME}/{folder}/model.pth", f"timm:{folder}"]
    return model, names


@torch.no_grad()
def test_a_checkpoint_of_timm_by_path_gives_its_own_features(saved, tmp_path, monkeypatch):
    model, names = saved
    model.reset_classifier(0)
    own = load_vision(model)
    pixels = own.preprocess([picture(0), picture(1)])
    for name in names:
        assert torch.allclose(load_vision(name)(pixels), own(pixels), atol=1e-4), name
    fresh = load_vision(timm.create_model(NAME, pretrained=False, num_classes=0).eval())
    assert not torch.allclose(fresh(pixels), own(pixels), atol=1e-4)
    monkeypatch.chdir(tmp_path)
    assert load_vision(f"timm:{NAME}/my encoder/model.safetensors").feature_dim == 256


@torch.no_grad()
def test_a_checkpoint_of_open_clip_by_path_gives_its_own_features(tmp_path):
    import open_clip

    torch.manual_seed(3)
    clip = open_clip.create_model("ViT-S-32-alt", pretrained=None).eval()
    save_file({name: tensor.contiguous() for name, tensor in clip.state_dict().items()}, tmp_path / "w.safetensors")
    vision = load_vision(f"open_clip:ViT-S-32-alt/{tmp_path}/w.safetensors")
    pixels = vision.preprocess([picture(0)])
    assert torch.allclose(vision(pixels), load_vision(clip)(pixels), atol=1e-5)


@pytest.mark.parametrize(
    "name, error, words",
    [
        ("timm:no_such_net", GroundingValueError, "timm knows no"),
        (f"timm:{NAME}/none.safetensors", GroundingFileError, "no file 'none.safetensors'"),
        (f"timm:{NAME}/{__file__}", GroundingFileError, "cannot be loaded"),
        (f"timm:{NAME}", GroundingFileError, "on disk"),
        ("timm:no/such/folder", GroundingValueError, "no folder"),
        ("timm:/no/such/folder", GroundingFileError, "no folder '/no/such/folder'"),
        (__file__, GroundingFileError, "timm:ARCHITECTURE/FILE"),
        ("open_clip:ViT-B-32/none.pt", GroundingFileError, "no file 'none.pt'"),
        (f"open_clip:ViT-B-32/{__file__}", GroundingFileError, "cannot be loaded"),
        ("/no/such/folder", GroundingFileError, "no folder"),
    ],
)
def test_what_cannot_be_loaded_is_one_error_that_says_how_weights_are_given(name, error, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(GroundingError, match=words) as raised:
        load_vision(name)
    assert isinstance(raised.value, error) and "\n" not in str(raised.value)


def test_a_checkpoint_without_its_library_is_told_how_it_is_named(saved, tmp_path):
    folder = tmp_path / "my encoder"
    (tmp_path / "empty").mkdir()
    for name in (folder, folder / "model.safetensors", folder / "model.pth", tmp_path / "empty"):
        with pytest.raises(GroundingFileError, match="timm:FOLDER, timm:ARCHITECTURE/FILE") as raised:
            load_vision(str(name))
        assert "\n" not in str(raised.value)


def test_a_name_given_when_loading_is_kept_when_saving(saved, tmp_path):
    model, names = saved
    model.reset_classifier(0)
    own = VisionEncoder(model, load_vision(names[0]).image_processor)
    lm, config = build("llama_untied"), GroundingConfig(retrieval_dim=6, caption_prompt="w7", image_prompt="{image}")
    first = ground(lm, own, tokenizer(), config=config)
    first.save_pretrained(tmp_path / "unnamed")
    vectors = first.embed_images([picture(0)])
    first.unground()
    for name, folder in ((names[0], "unnamed"), (names[2], "named")):
        loaded = GroundedModel.from_pretrained(lm, tmp_path / folder, name, tokenizer())
        loaded.save_pretrained(tmp_path / "named")
        loaded.unground()
        again = GroundedModel.from_pretrained(lm, tmp_path / "named", tokenizer=tokenizer())
        assert again.active.metadata.provenance["vision_encoder"] == name
        assert torch.allclose(again.embed_images([picture(0)]), vectors, atol=1e-5)
        again.unground()
    given = GroundedModel.from_pretrained(lm, tmp_path / "named", own, tokenizer(), image_processor)
    given.save_pretrained(tmp_path / "named")
    assert given.active.metadata.provenance["vision_encoder"] == names[2]


def test_local_names_hold_in_every_working_folder(saved, tmp_path, monkeypatch):
    folder, elsewhere = tmp_path / "my encoder", tmp_path / "elsewhere"
    elsewhere.mkdir()
    build("llama_untied").save_pretrained(tmp_path / "lm")
    tokenizer().save_pretrained(tmp_path / "lm")
    whole = [f"timm:{NAME}/{folder}/model.pth", f"timm:{folder}"]
    for relative, name in zip([f"timm:{NAME}/my encoder/model.pth", "timm:my encoder"], whole, strict=True):
        monkeypatch.chdir(tmp_path)
        model = ground("lm", relative, config=GroundingConfig(retrieval_dim=6))
        model.save_pretrained("adapter")
        vectors = model.embed_images([picture(0)])
        monkeypatch.chdir(elsewhere)
        again = GroundedModel.from_pretrained(tmp_path / "adapter")
        assert again.active.provenance["vision_encoder"] == name and torch.equal(
            again.embed_images([picture(0)]), vectors
        )
        # What was loaded from a folder stays unpublished from everywhere.
        assert not any(published(again.active.metadata).provenance.values())


def test_names_of_the_hub_and_of_libraries_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai").write_bytes(b"")  # A tag of open_clip, not this file.
    (tmp_path / "tower").mkdir()
    for name in ("gpt2", "me/lm", "me/lm#vision_model", f"timm:{NAME}", "open_clip:ViT-B-32/openai", "a:b", "", "#"):
        assert rooted(name) == name
    assert rooted("tower#vision_model") == f"{tmp_path}/tower#vision_model"
    assert rooted("./tower/") == str(tmp_path / "tower") == rooted(rooted("tower"))
