"""What stands in for the Hub when the documentation's code runs: the names are the page's own, the models are tiny.

`documentation` puts a test into a temporary folder in which

- Hub names of language models, vision encoders and adapters (`HUB`) load through the real huggingface_hub client from a
  small server on loopback, so `push_to_hub` works too;
- Hub names of datasets and of a LoRA are folders, which `datasets` and `peft` find before they ask the Hub;
- the files that the pages speak of exist: `photos/` with 64 pictures and a table of captions, some pictures by
  themselves, a GGUF file, an official FROMAGe checkpoint, and the adapter and the index that `make demo` leaves.

`localise` changes two things in the code itself: the number of training steps, and the name of a pretrained open_clip
tower, which becomes a file of random weights for a smaller one.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel

from tests.gguf_file import write_gguf
from tests.paths import GOLDEN
from tests.storage.hub_client import hub  # noqa: F401
from tests.tiny import build, picture
from visual_ground import ImageIndex, ground
from visual_ground.adapter.anchors import Anchors

LANGUAGE_MODELS = (
    "Qwen/Qwen2.5-0.5B-Instruct",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "meta-llama/Llama-3.1-8B",
    "google/gemma-3-270m",
)
ENCODERS = ("openai/clip-vit-base-patch32", "facebook/dinov2-small")
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
PICTURES = ("beach.jpg", "boat.jpg", "cat.png", "dog.jpg")
PAIRS = 64


def folder_of(path: Path) -> dict[str, bytes]:
    """Return the files of a folder, name to bytes."""
    return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}


def localise(code: str) -> str:
    """Return a page's code with few training steps and a small open_clip tower."""
    code = re.sub(r"max_steps=\d+", "max_steps=2", code)
    code = re.sub(r"--steps \d+", "--steps 2", code)
    return code.replace("open_clip:ViT-B-32/laion2b_s34b_b79k", "open_clip:ViT-S-32-alt/tower.pt")


@pytest.fixture
def documentation(hub, tmp_path, monkeypatch):  # noqa: F811
    """The folder that a page's code runs in, with the Hub of this module."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "writer")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    _put_models(hub, tmp_path)
    _write_pictures(tmp_path)
    write_gguf(_parent_of(tmp_path / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"), True, vocab_size=512)
    shutil.copytree(GOLDEN / "a" / "official", tmp_path / "fromage_model" / "fromage_vis4")
    return tmp_path


def write_open_clip_tower(folder: Path) -> torch.nn.Module:
    """Write the random weights that `localise` names, and return the model that has them."""
    import open_clip

    model = open_clip.create_model("ViT-S-32-alt", pretrained=None)
    torch.save(model.state_dict(), folder / "tower.pt")
    return model


def _write_lora(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    get_peft_model(_language_model(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)


def _language_model():
    return build(
        "llama_untied", vocab_size=512, hidden_size=64, intermediate_size=128, head_dim=16, num_key_value_heads=4
    )


def _whole_clip(folder: Path) -> dict[str, bytes]:
    """Return the files of a CLIP model whose tower is that of tests/golden/vision."""
    tower = CLIPVisionModel.from_pretrained(GOLDEN / "vision")
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=tower.config.to_dict(), projection_dim=16))
    model.vision_model.load_state_dict(tower.state_dict())
    model.save_pretrained(folder)
    shutil.copy(GOLDEN / "vision" / "preprocessor_config.json", folder)
    return folder_of(folder)


def _put_models(server, folder: Path) -> None:
    made = folder / "made"
    _language_model().save_pretrained(made / "lm")
    for file in ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"):
        shutil.copy(GOLDEN / "lm" / file, made / "lm")
    lm, vision = folder_of(made / "lm"), folder_of(GOLDEN / "vision")
    settings = {**json.loads(lm["tokenizer_config.json"]), "chat_template": CHAT_TEMPLATE}
    chat = {**lm, "tokenizer_config.json": json.dumps(settings).encode()}
    for name in LANGUAGE_MODELS:
        server.put("models", name, chat if name.endswith("Instruct") else lm)
    for name in ENCODERS:
        server.put("models", name, vision)
    server.put("models", "facebook/opt-6.7b", folder_of(GOLDEN / "lm"))
    server.put("models", "openai/clip-vit-large-patch14", _whole_clip(made / "clip"))
    _write_lora(folder / "me" / "my-lora")
    model = ground(LANGUAGE_MODELS[0], ENCODERS[0])
    captions = [[f"the number {i}"] for i in range(8)]
    model.active.anchors = Anchors(captions, torch.randn(len(captions), model.vision.feature_dim))
    for name in ("me/adapter", "me/birds"):
        model.push_to_hub(name)
    index = ImageIndex.build(model, [picture(i) for i in range(4)])
    index.push_to_hub("me/index")
    model.save_pretrained("demo/adapter")
    index.save_pretrained("demo/index")


def _write_pictures(folder: Path) -> None:
    names = [*PICTURES, *(f"{i:02d}.jpg" for i in range(PAIRS - len(PICTURES)))]
    for target, column in (("photos", "caption"), ("jxie/flickr8k", "caption_0")):
        lines = [f"file_name,{column}"]
        for seed, name in enumerate(names):
            picture(seed).resize((32, 32)).save(_parent_of(folder / target / name))
            lines.append(f"{name},the {Path(name).stem} of all")
        (folder / target / "metadata.csv").write_text("\n".join(lines) + "\n")
    for name in PICTURES:
        shutil.copy(folder / "photos" / name, folder)


def _parent_of(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
