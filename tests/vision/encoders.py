"""Every kind of image encoder that can be built here without weights, at its own width but few layers."""

import importlib
import json
import re
import tempfile
from pathlib import Path

import numpy as np
import open_clip
import timm
import torch
import transformers
from filelock import FileLock
from PIL import Image
from transformers import CLIPImageProcessor
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from tests.paths import DOCS
from visual_ground.errors import GroundingError, GroundingValueError
from visual_ground.vision.loading import load_vision, processor_of

RESULTS = DOCS / "vision.json"
PARTS = 4

# Whole models that read text and images, and towers of such; the image mapping has the others.
WHOLE_AND_TOWERS = (
    "align align_vision_model altclip altclip_vision_model aimv2 blip blip_vision_model blip-2 blip_2_vision_model "
    "chinese_clip chinese_clip_vision_model clip clip_vision_model clipseg clipseg_vision_model flava "
    "flava_image_model groupvit groupvit_vision_model idefics2_vision internvl_vision metaclip_2 "
    "metaclip_2_vision_model owlv2 owlv2_vision_model owlvit owlvit_vision_model sam_vision_model siglip siglip2 "
    "siglip2_vision_model tipsv2 videoprism xclip"
).split()
# Default configs that do not fit themselves, and the name that a config of timm's leaves open.
SETTINGS = {
    "llama4": {"intermediate_size": 3072},
    "swin2sr": {"depths": [1, 1], "num_heads": [6, 6]},
    "timm_backbone": {"backbone": "resnet18"},
}
SMALL_WORDS = (
    "test_ atto femto pico nano xxt _xt tiny mini micro xxs _xs small _s _t 050 _0 18 lite _b0 b1 base _b".split()
)


def transformers_names():
    """Return the names of the image mapping, then whole models and their towers."""
    mapped = list(modeling_auto.MODEL_FOR_IMAGE_MAPPING_NAMES)
    whole = [*modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES, *WHOLE_AND_TOWERS]
    return mapped, [name for name in dict.fromkeys(whole) if name in CONFIG_MAPPING_NAMES and name not in mapped]


def open_clip_names():
    """Return the smallest model of each family: its image tower's kind, and what it is put together with."""
    families = {}
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        vision, text = config["vision_cfg"], config.get("text_cfg", {})
        trunk = vision.get("timm_model_name", "").split("/")[-1]
        own = "resnet" if isinstance(vision.get("layers"), list) else "vit"
        kind = re.split(r"[-_.\d]", trunk)[0] if trunk else f"own {own}"
        family = kind, "multimodal_cfg" in config, "hf_model_name" in text
        families.setdefault(family, []).append((vision.get("width") or 10**4, len(name), name))
    return [min(models)[-1] for models in families.values()]


def timm_names():
    """Return the smallest model, going by its name, of each family."""

    def size(name):
        return next((i for i, word in enumerate(SMALL_WORDS) if word in name), len(SMALL_WORDS)), len(name), name

    families = {family: timm.list_models(module=family) for family in timm.list_modules()}
    return {family: min(models, key=size) for family, models in families.items() if models}


def build_transformers(name):
    """Return a transformers model and its processor, or None where the model's own is to be found."""
    config = _shrink(CONFIG_MAPPING[name]())
    for key, value in SETTINGS.get(name, {}).items():
        setattr(getattr(config, "vision_config", config), key, value)
    mapping = modeling_auto.MODEL_FOR_IMAGE_MAPPING
    mapping = mapping if name in modeling_auto.MODEL_FOR_IMAGE_MAPPING_NAMES else modeling_auto.MODEL_MAPPING
    kind = mapping[type(config)] if type(config) in mapping else _class_of(config)
    kind = kind[0] if isinstance(kind, tuple) else kind
    if kind.config_class is not type(config):
        config = config.vision_config
    model = kind._from_config(config)
    return model, _processor(model, config)


def _class_of(config):
    """Return the model class of a tower that no mapping names."""
    module = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    classes = [kind for kind in vars(module).values() if getattr(kind, "config_class", None) is type(config)]
    return next(kind for kind in classes if not kind.__name__.endswith("PreTrainedModel"))


def _processor(model, config):
    """Return the processor that belongs to a model, at a size that a walk can afford."""
    try:
        processor = processor_of(model)
    except GroundingValueError:
        size = getattr(config, "image_size", None)
        side = size if isinstance(size, int) else 224
        return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    size = getattr(processor, "size", None)
    if size is not None and (size.get("shortest_edge") or 0) >= 512:
        processor.size = {"shortest_edge": 128, "longest_edge": 256}
    if hasattr(processor, "clusters") and processor.clusters is None:
        palette = np.random.default_rng(0).uniform(-1, 1, (config.vocab_size - 1, 3))
        processor = type(processor)(clusters=palette, size={"height": 32, "width": 32})
    return processor


def _shrink(config, text=False):
    """Make a config's model shallow, and its text side small; widths of vision stay."""

    def put(**values):
        for name, value in values.items():
            if isinstance(getattr(config, name, None), int):
                setattr(config, name, value)

    if not hasattr(config, "depths") and not hasattr(config, "fusion_hidden_size"):
        depths = "num_hidden_layers encoder_layers decoder_layers num_local_layers num_global_layers".split()
        put(**{name: min(2, getattr(config, name, None) or 2) for name in depths})
    if text:
        put(hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2, head_dim=32)
        put(vocab_size=1000)
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = config.layer_types[: getattr(config, "num_hidden_layers", None)]
    for part in getattr(config, "sub_configs", None) or {}:
        inner = getattr(config, part, None)
        if hasattr(inner, "to_dict") and hasattr(config, "fusion_hidden_size"):
            # A depth network reads layers by number, so its towers keep their depth and lose width.
            inner.update({"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 12})
        elif hasattr(inner, "to_dict"):
            _shrink(inner, "text" in part)
    return config


def build_open_clip(name):
    """Return an open_clip model with two layers of its own tower and a tiny text side, and no processor."""
    config = json.loads(json.dumps(open_clip.get_model_config(name)))
    if isinstance(config["vision_cfg"].get("layers"), int):
        config["vision_cfg"]["layers"] = 2
    config["vision_cfg"]["timm_model_pretrained"] = False
    text = {"context_length": 16, "vocab_size": 1000, "width": 64, "heads": 1, "layers": 1}
    config["text_cfg"] = {**text, **({"embed_cls": True} if "multimodal_cfg" in config else {})}
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] = {
            **config["multimodal_cfg"],
            "width": 64,
            "heads": 1,
            "layers": 1,
            "context_length": 16,
        }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"walk_{name}.json"
        path.write_text(json.dumps(config))
        open_clip.add_model_config(path)
        model = open_clip.create_model(f"walk_{name}", pretrained=None)
    model.walk_config = config
    return model, None


def build_timm(name):
    """Return a timm model with its classifier, and no processor."""
    return timm.create_model(name, pretrained=False), None


def known_widths(model):
    """Return the numbers that a model's own settings name, among which its features' width must be."""
    if hasattr(model, "visual"):
        return {model.visual.output_dim} if hasattr(model.visual, "output_dim") else _numbers(model.walk_config)
    if hasattr(model, "pretrained_cfg"):
        return {getattr(model, "head_hidden_size", None) or model.num_features}
    if (timms := getattr(model, "timm_model", None)) is not None:
        return {timms.num_features}
    if (timms := getattr(model, "_backbone", None)) is not None:
        return set(timms.feature_info.channels())
    if hasattr(model.config, "depth_multiplier") or hasattr(model.config, "width_coefficient"):
        # Multiplied widths are in no setting.
        return {part.num_features for part in model.modules() if isinstance(part, torch.nn.BatchNorm2d)}
    return _numbers(model.config.to_dict())


def _numbers(value):
    """Return all whole numbers in nested settings, and the doubles that two-directional or hybrid towers use."""
    if isinstance(value, dict):
        return set().union(*map(_numbers, value.values())) if value else set()
    if isinstance(value, (list, tuple)):
        return set().union(*map(_numbers, value)) if value else set()
    return {value} if isinstance(value, int) else set()


def pictures():
    """Return two different pictures of different shapes."""
    noise = np.random.default_rng(0)
    sizes = ((70, 90, 3), (64, 64, 3))
    return [Image.fromarray(noise.integers(0, 256, size, dtype=np.uint8)) for size in sizes]


@torch.no_grad()
def walk(build, name):
    """Build one encoder and hold it to what an encoder must do.

    Returns:
        name, the class, and width and patch_width, or the reason for which there are none.
    """
    torch.manual_seed(0)
    row = {"name": name}
    try:
        model, processor = build(name)
    except ImportError as error:
        return {**row, "model": None, "reason": " ".join(str(error).split())[:160]}
    row["model"] = type(model).__name__
    try:
        vision = load_vision(model, processor, num_patch_tokens=PARTS)
    except ImportError as error:
        return {**row, "reason": " ".join(str(error).split())[:160]}
    except GroundingError as error:
        row["no_patches"] = str(error)
        try:
            vision = load_vision(model, processor)
        except GroundingError as refused:
            return {"name": name, "model": row["model"], "reason": str(refused)}
    vision.eval()
    images = pictures()
    together = vision(vision.preprocess(images))
    assert together.shape == (2, vision.feature_dim) and torch.isfinite(together).all()
    alone = torch.cat([vision(vision.preprocess([image])) for image in images])
    room = 1e-3 * float(together.abs().max())
    assert torch.allclose(together, alone, rtol=1e-3, atol=room), "a batch is not its rows"
    widths = known_widths(model)
    assert vision.pooled_dim in widths, f"{vision.pooled_dim} is not one of {sorted(widths)}"
    vision.release()
    return {**row, "width": vision.pooled_dim, "patch_width": vision.patch_dim or None}


def record(group, row):
    """Put one result into the file of results."""
    with FileLock(Path(tempfile.gettempdir()) / "visual_ground_vision_results.lock"):
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        results["versions"] = {module.__name__: module.__version__ for module in (open_clip, timm, torch, transformers)}
        results.setdefault(group, {})[row["name"]] = {key: value for key, value in row.items() if key != "name"}
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
