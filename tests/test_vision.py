import pytest
import torch
from PIL import Image
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from visual_ground.errors import GroundingError
from visual_ground.vision_features import pool
from visual_ground.vision_loading import load_vision

PROCESSOR = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def test_transformers_tower():
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    vision = load_vision(CLIPVisionModel(config), PROCESSOR)
    assert vision.feature_dim == 16
    assert vision(vision.preprocess([Image.new("L", (9, 7)), Image.new("RGBA", (5, 5))])).shape == (2, 16)


def test_timm_and_open_clip_find_their_own_preprocessing():
    import open_clip
    import timm

    assert load_vision(timm.create_model("test_efficientnet", num_classes=0)).feature_dim == 256
    clip = open_clip.create_model("ViT-S-32-alt", pretrained=None)
    assert load_vision(clip).feature_dim == 256


def test_any_module_with_a_processor():
    vision = load_vision(nn.Sequential(nn.Conv2d(3, 5, 4), nn.ReLU()), PROCESSOR)
    assert vision.feature_dim == 5


def test_pooling_shapes():
    assert pool(torch.zeros(2, 5)).shape == pool(torch.zeros(2, 7, 5)).shape == pool(torch.zeros(2, 5, 3, 3)).shape


def test_what_cannot_be_an_encoder_is_refused():
    with pytest.raises(GroundingError, match="image_processor"):
        load_vision(nn.Linear(3, 3))
    with pytest.raises(GroundingError, match="gave no features"):
        load_vision(nn.Linear(99, 3), PROCESSOR)
    with pytest.raises(GroundingError, match="got int"):
        load_vision(3)
