import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    VideoMAEConfig,
    VideoMAEModel,
    ViTConfig,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from tests.tiny import Eye, build, image_processor, picture, tokenizer
from visual_ground import GroundedModel, GroundingConfig, GroundingTrainer, GroundingTrainingArguments, ground
from visual_ground.errors import GroundingError, GroundingTypeError, GroundingValueError
from visual_ground.vision.encoder import VisionEncoder
from visual_ground.vision.loading import load_vision
from visual_ground.vision.pooling import patches, pool

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


@torch.no_grad()
@pytest.mark.parametrize("count", [0, 1, 8, 19])
def test_a_cpu_runs_a_few_images_at_once_and_features_keep_their_order(count):
    sizes, tower = [], nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    vision = VisionEncoder(tower, lambda images, return_tensors: {"pixel_values": torch.zeros(len(images), 3, 2, 2)})
    tower.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    pixels = torch.randn(count, 3, 2, 2)
    features = vision(pixels)
    assert sizes == ([8] * (count // 8) + [count % 8] * bool(count % 8) if count else [0])
    torch.testing.assert_close(features, tower(pixels))


def test_pooling_shapes():
    assert pool(torch.zeros(2, 5)).shape == pool(torch.zeros(2, 7, 5)).shape == pool(torch.zeros(2, 5, 3, 3)).shape


def test_maps_whose_features_cannot_be_told_are_refused():
    with pytest.raises(GroundingError, match="cannot be told"):
        pool(torch.zeros(1, 35, 577, 1024))
    assert pool(torch.zeros(1, 9, 9, 5)).shape == pool(torch.zeros(1, 5, 9, 9)).shape == (1, 5)
    with pytest.raises(GroundingError, match="clips of frames"):
        pool(torch.zeros(1, 2, 3, 4, 4))
    with pytest.raises(GroundingError, match="int64"):
        pool(torch.zeros(1, 5, dtype=torch.long))


def test_patches_are_means_of_their_part_of_the_picture():
    grid = torch.arange(16.0).view(1, 1, 4, 4)
    quarters = patches(grid, 4)
    assert quarters.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    row = grid.flatten(2).transpose(1, 2)
    with_prefix = torch.cat([torch.full((1, 5, 1), 99.0), row], dim=1)
    assert torch.equal(patches(row, 4), quarters) and torch.equal(patches(with_prefix, 4, 5), quarters)
    assert torch.equal(patches(with_prefix[:, 4:], 4), quarters)
    assert torch.equal(patches(grid.permute(0, 2, 3, 1), 4), quarters)
    assert patches(torch.zeros(2, 7, 3), 3, 0).shape == (2, 3, 3)
    with pytest.raises(GroundingValueError, match="fewer than"):
        patches(grid, 17)
    with pytest.raises(GroundingValueError, match="no patches"):
        patches(torch.zeros(2, 5), 4)


def tower(**changes):
    settings = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    return CLIPVisionModel(CLIPVisionConfig(**settings, image_size=16, patch_size=4, **changes))


def test_a_row_holds_pooled_features_and_then_the_parts():
    model = tower()
    whole, pooled = load_vision(model, PROCESSOR, num_patch_tokens=4), load_vision(model, PROCESSOR)
    pixels = pooled.preprocess([picture(0), picture(1)])
    rows = whole(pixels)
    assert (whole.pooled_dim, whole.patch_dim, whole.feature_dim) == (16, 16, 80) and rows.shape == (2, 80)
    assert torch.equal(rows[:, :16], pooled(pixels))
    states = model(pixels).last_hidden_state[:, 1:].view(2, 2, 2, 2, 2, 16)
    assert torch.allclose(rows[:, 16:].view(2, 2, 2, 16), states.mean((2, 4)), atol=1e-5)


def test_patches_become_visual_tokens_learn_and_come_back(tmp_path):
    lm = build("llama_untied")
    config = GroundingConfig(num_visual_tokens=4, visual_tokens_from="patches", retrieval_dim=6)
    model = ground(lm, tower(), tokenizer(), PROCESSOR, config)
    assert (
        model.adapter.image_projection.weight.shape == (32, 16)
        and model.adapter.image_retrieval_projection.in_features == 16
    )
    inputs = model.prepare([["w4", picture(0), "w5"]])
    rows = model.active.image_tokens(inputs["pixel_values"])
    assert rows.shape == (4, 32)
    features = model.vision(inputs["pixel_values"])
    other = features.clone()
    other[:, 16 + 2 * 16 : 16 + 3 * 16] += 1
    changed = (model.adapter.image_tokens(other) != rows).any(-1)
    assert changed.tolist() == [False, False, True, False]
    assert torch.equal(model.embed_images(image_features=other), model.embed_images([picture(0)]))
    pairs = [{"image": picture(i), "caption": f"w{10 + i} w5 w6"} for i in range(8)]
    args = GroundingTrainingArguments(str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=4, use_cpu=True)
    GroundingTrainer(model, args, pairs).train()
    assert model.adapter.feature_std.shape == (80,) and bool((model.adapter.feature_std != 1).any())
    model.eval().save_pretrained(tmp_path / "adapter")
    parts = model.vision.model, tokenizer(), PROCESSOR
    loaded = GroundedModel.from_pretrained(build("llama_untied"), tmp_path / "adapter", *parts)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    with pytest.raises(GroundingValueError, match="visual_tokens_from"):
        GroundingConfig(visual_tokens_from="tiles")
    with pytest.raises(GroundingError, match='visual_tokens_from="pooled"'):
        ground(build("gpt2"), Eye(), tokenizer(), image_processor, config)


def test_an_encoder_that_masks_at_random_sees_whole_images():
    settings = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16)
    model = ViTMAEModel(ViTMAEConfig(**settings, patch_size=4))
    vision = load_vision(model, PROCESSOR, num_patch_tokens=4).eval()
    pixels = vision.preprocess([picture(0)])
    assert model.config.mask_ratio == 0 and torch.equal(vision(pixels), vision(pixels))
    vision.release()
    assert model.config.mask_ratio == 0.75

    class Drops(nn.Module):
        def forward(self, pixels):
            return nn.functional.dropout(pixels.flatten(1), 0.5, training=True)

    with pytest.raises(GroundingValueError, match="other features for the same image"):
        load_vision(Drops(), PROCESSOR)


def test_a_pooler_that_a_checkpoint_lacks_is_named_and_not_used(tmp_path, caplog):
    settings = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16)
    ViTModel(ViTConfig(**settings, patch_size=4), add_pooling_layer=False).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    vision = load_vision(str(tmp_path)).eval()
    assert "no weights for the pooler" in caplog.text
    pixels = vision.preprocess([picture(0)])
    assert torch.equal(vision(pixels), vision.model(pixels).last_hidden_state.mean(1))


def test_preprocessing_is_found_by_name_or_kind_and_images_of_any_shape_become_one(tmp_path, caplog):
    config = Siglip2VisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=16, num_patches=64
    )
    vision = load_vision(Siglip2VisionModel(config)).eval()
    assert "its kind" in caplog.text and vision.preprocessing.square_side == 512
    images = [picture(0).resize((60, 30)), picture(1).resize((20, 50))]
    together = vision(vision.preprocess(images))
    assert torch.allclose(together[1:], vision(vision.preprocess(images[1:])), atol=1e-5)


def test_a_width_given_by_hand_is_not_looked_for():
    class Once(nn.Module):
        def forward(self, pixels):
            raise AssertionError

    vision = VisionEncoder(Once(), PROCESSOR, feature_dim=7)
    assert vision.feature_dim == 7 and load_vision(vision) is vision


def test_other_senses_are_refused_by_name():
    settings = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(GroundingTypeError, match="reads videos"):
        load_vision(VideoMAEModel(VideoMAEConfig(**settings, image_size=16, patch_size=8)), PROCESSOR)
    with pytest.raises(GroundingTypeError, match="'input_ids', not pixels"):
        load_vision(CLIPTextModel(CLIPTextConfig(**settings)), PROCESSOR)
    with pytest.raises(GroundingValueError, match="open_clip knows no"):
        load_vision("open_clip:none")
    with pytest.raises(GroundingValueError, match="names no weights"):
        load_vision("open_clip:ViT-B-32")


def test_what_cannot_be_an_encoder_is_refused():
    with pytest.raises(GroundingError, match="image_processor"):
        load_vision(nn.Linear(3, 3))
    with pytest.raises(GroundingError, match="gave no features"):
        load_vision(nn.Linear(99, 3), PROCESSOR)
    with pytest.raises(GroundingError, match="got int"):
        load_vision(3)


def test_encode_runs_images_in_batches_and_takes_one_alone(tmp_path):
    vision = load_vision(tower(), PROCESSOR).eval()
    images = [picture(i) for i in range(5)]
    picture(0).save(tmp_path / "0.png")
    at_once = vision(vision.preprocess(images))
    assert torch.allclose(vision.encode(images, batch_size=2), at_once, atol=1e-5)
    assert torch.equal(vision.encode(iter(images), batch_size=2), vision.encode(images, batch_size=2))
    for alone in (images[0], str(tmp_path / "0.png"), {"bytes": (tmp_path / "0.png").read_bytes()}):
        assert torch.allclose(vision.encode(alone), at_once[:1], atol=1e-5)
    for call in (lambda: vision.encode([]), lambda: vision.encode(images, batch_size=0)):
        with pytest.raises(GroundingValueError, match="at least"):
            call()
