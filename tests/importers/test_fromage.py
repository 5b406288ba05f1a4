"""Official checkpoints become adapters that compute what the official implementation computes."""

import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

from tests.paths import GOLDEN
from tests.training.test_golden import batch_of, close
from visual_ground import GroundedModel, GroundingError, ImageIndex
from visual_ground.cli.main import main
from visual_ground.errors import GroundingFileError, GroundingValueError
from visual_ground.importers.fromage.answers import PublishedDecoding, answer_as_published
from visual_ground.importers.fromage.convert import read_official, read_official_index
from visual_ground.importers.fromage.unpickler import read_lists
from visual_ground.training.losses.objective import GroundingObjective
from visual_ground.vision.loading import load_vision

CHECKPOINTS = {"a": "pretrained_ckpt.pth.tar", "a pruned": "pruned.pth.tar", "b": "pretrained_ckpt.pth.tar"}


@pytest.fixture(params=sorted(CHECKPOINTS))
def golden(request, tmp_path):
    """Import through the command line; the official code adds one token before [RET]."""
    folder = GOLDEN / request.param[0]
    checkpoint = folder / "official" / CHECKPOINTS[request.param]
    command = ["import-fromage", str(folder / "official"), "--output", str(tmp_path), "--checkpoint", str(checkpoint)]
    assert main(command) == 0
    words = AutoTokenizer.from_pretrained(GOLDEN / "lm")
    words.add_tokens(["<|image|>"])
    model = GroundedModel.from_pretrained(
        str(GOLDEN / "lm"), tmp_path, str(GOLDEN / "vision"), words, is_trainable=True
    )
    index = ImageIndex.from_pretrained(tmp_path / "index")
    tensors, values = load_file(folder / "golden.safetensors"), json.loads((folder / "golden.json").read_text())
    images = np.load(folder / "images_uint8.npy")
    return SimpleNamespace(model=model, index=index, tensors=tensors, values=values, images=images)


def test_losses_and_embeddings(golden):
    model, batch, log = golden.model, batch_of(golden), golden.values["train_nc.log"][0]
    losses = GroundingObjective(model)(**batch)
    theirs = dict(loss="loss", captioning="ce_captioning", text_retrieval="ce_retrieval")
    theirs |= dict(text_to_image="caption_loss", image_to_text="image_loss")
    for ours, name in theirs.items():
        close(losses[ours], log[name])
    with torch.no_grad():
        images = model.adapter.embed_images(model.vision(batch["pixel_values"]))
    close(images, torch.nn.functional.normalize(golden.tensors["ret.visual_embs"], dim=-1), 1e-6)
    close(golden.index.vectors, torch.nn.functional.normalize(golden.tensors["ret.emb_matrix"], dim=-1), 1e-6)


PROMPTS = {
    "gfit.nw0_text": ["the program[RET]"],
    "gfit.nw0_text_text": ["the program", "is a module[RET]"],
    "gfit.nw0_text_image": ["the program[RET]", "<images_uint8[0]>"],
}


@pytest.mark.parametrize("key", ["interleaved", "interleaved_defaults", "interleaved_scale1", *PROMPTS])
def test_answers(golden, key):
    key = key if key.startswith("gfit.") else f"gfit.{key}"
    wanted, picture = golden.values[key], Image.fromarray(golden.images[0])
    prompt = [picture if part.startswith("<images") else part for part in PROMPTS.get(key) or golden.values["prompt"]]
    options = {name: value for name, value in wanted["kwargs"].items() if name != "temperature"}
    answer = answer_as_published(golden.model, prompt, golden.index, PublishedDecoding(**options))
    texts = [part.removesuffix(" [RET]") for part in wanted["outputs"] if isinstance(part, str)]
    assert [part for part in answer.parts if isinstance(part, str)] == texts
    images = [number for part in wanted["outputs"] if isinstance(part, list) for number in part]
    assert [image.id for image in answer.images] == images
    scores = torch.tensor([image.score for image in answer.images]) * golden.model.adapter.logit_scale.exp()
    close(scores, [score for best in wanted["topk_scores"] for score in best[:2]])


def test_images_that_cannot_be_shown_are_passed_over(golden):
    wanted = golden.values["gfit.interleaved_fail_first2"]
    kept = [i for i in range(len(golden.index)) if i not in wanted["failing"]]
    index = ImageIndex(golden.index.vectors[kept], kept)
    picture = Image.fromarray(golden.images[0])
    prompt = [picture if part.startswith("<images") else part for part in golden.values["prompt"]]
    options = {name: value for name, value in wanted["kwargs"].items() if name != "temperature"}
    answer = answer_as_published(golden.model, prompt, index, PublishedDecoding(**options))
    images = [number for part in wanted["outputs"] if isinstance(part, list) for number in part]
    assert [image.id for image in answer.images] == images


def test_a_prompt_without_ret_cannot_be_looked_up(golden):
    with pytest.raises(GroundingValueError, match="in the prompt"):
        answer_as_published(golden.model, "the program", golden.index, PublishedDecoding(num_words=0))


def test_ret_keeps_the_norm_that_training_gave_it(tmp_path):
    whole = read_official(GOLDEN / "a" / "official", GOLDEN / "a" / "official" / "pruned.pth.tar")
    table = load_file(GOLDEN / "lm" / "model.safetensors")["model.decoder.embed_tokens.weight"][:501]
    close(whole.tensors["ret_norms"], table.norm(dim=-1).mean().repeat(2))
    released = read_official(GOLDEN / "a" / "official")
    close(released.tensors["ret_norms"], released.tensors["ret_input"].norm().repeat(2))


def official_with(folder, **changes):
    shutil.copytree(GOLDEN / "a" / "official", folder)
    args = json.loads((folder / "model_args.json").read_text())
    (folder / "model_args.json").write_text(json.dumps({**args, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_image_embed_norm": True}, "use_image_embed_norm"),
        ({"n_visual_tokens": 2}, "image_projection.weight"),
        ({"text_emb_layers": [-1, 0]}, "missing: model.text_hidden_fcs.1.0.weight"),
        ({"text_emb_layers": ["x"]}, "text_emb_layers"),
        ({"shared_emb_dim": 31}, "image_retrieval_projection.weight"),
        ({"opt_version": None}, "opt_version"),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path, changes, words):
    with pytest.raises(GroundingError, match=words.replace(".", r"\.")):
        read_official(official_with(tmp_path / "official", **changes))
    assert main(["import-fromage", str(tmp_path / "official"), "--output", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


class Evil:
    def __reduce__(self):
        return os.system, ("touch run",)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_pickles_run_nothing(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    folder = official_with(tmp_path / "official")
    torch.save({"state_dict": {"a": Evil()}}, folder / "pretrained_ckpt.pth.tar")
    with pytest.raises(GroundingFileError, match="more than tensors"):
        read_official(folder)
    raw = pickle.dumps({"paths": [Evil()], "embeddings": []}, protocol=protocol)
    (folder / "cc3m_embeddings.pkl").write_bytes(raw)
    with pytest.raises(GroundingFileError, match="system"):
        read_official_index(folder)
    assert not Path("run").exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["<f2", "<f4", "<f8"])
def test_arrays_of_every_protocol_are_read(tmp_path, protocol, kind):
    rows = [np.arange(3).astype(kind), np.ones(3, kind)]
    for embeddings in (rows, np.stack(rows)):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps({"paths": ["x", "y"], "embeddings": embeddings}, protocol))
        paths, vectors = read_lists(tmp_path / "a.pkl", ("paths", "embeddings"))
        assert paths == ["x", "y"]
        assert torch.equal(torch.stack(vectors), torch.from_numpy(np.stack(rows)).float())


@pytest.mark.parametrize(
    "found",
    [
        [],
        {"paths": ["x"]},
        {"paths": ["x"], "embeddings": []},
        {"paths": [1], "embeddings": [np.ones(2, "f4")]},
        {"paths": ["x", "y"], "embeddings": [np.ones(2, "f4"), np.ones(3, "f4")]},
        {"paths": ["x"], "embeddings": [np.array(["a"], dtype=object)]},
        {"paths": ["x"], "embeddings": [np.ones(2, ">f4")]},
        {"paths": ["x"], "embeddings": [np.ones(2, "i4")]},
    ],
)
def test_other_contents_are_refused(tmp_path, found):
    (tmp_path / "cc3m_embeddings.pkl").write_bytes(pickle.dumps(found, protocol=4))
    with pytest.raises(GroundingFileError, match="cc3m_embeddings"):
        read_official_index(tmp_path)


def test_a_folder_without_embeddings_has_no_index(tmp_path):
    assert read_official_index(tmp_path) is None


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8),
    cut=st.integers(0, 10**6),
    name=st.sampled_from(["model_args.json", "pretrained_ckpt.pth.tar", "cc3m_embeddings.pkl"]),
)
def test_damaged_files_give_a_grounding_error_or_nothing(tmp_path_factory, edits, cut, name):
    folder = tmp_path_factory.mktemp("damaged") / "official"
    raw = bytearray((GOLDEN / "a" / "official" / name).read_bytes())
    for place, value in edits:
        raw[place % len(raw)] = value
    shutil.copytree(GOLDEN / "a" / "official", folder)
    (folder / name).write_bytes(raw[: len(raw) if cut % 2 else cut % len(raw)])
    try:
        read_official(folder)
        read_official_index(folder)
    except GroundingError:
        pass
    shutil.rmtree(folder.parent)


def test_a_vision_tower_is_named_inside_its_model(tmp_path):
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    config = CLIPConfig(vision_config=dict(sizes, image_size=32, patch_size=16), text_config=sizes, projection_dim=8)
    CLIPModel(config).save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path)
    assert load_vision(str(tmp_path)).feature_dim == 8
    assert load_vision(f"{tmp_path}#vision_model").feature_dim == 16
    with pytest.raises(GroundingValueError, match="no submodule 'tower'"):
        load_vision(f"{tmp_path}#tower")
