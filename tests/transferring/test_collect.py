import pytest
import torch

from tests.tiny import Eye, image_processor, picture
from visual_ground.errors import GroundingValueError
from visual_ground.transferring.collect import collect_anchors
from visual_ground.vision.encoder import VisionEncoder


def test_examples_become_anchors():
    vision = VisionEncoder(Eye(), image_processor)
    examples = [
        {"image": picture(0), "caption": ["one", "first"]},
        {"image": [picture(1), picture(2)], "caption": "two"},
    ]
    made = collect_anchors(examples, vision)
    assert made.texts == ("one", "first", "two")
    wanted = vision(vision.preprocess([picture(0), picture(1)])).half()
    assert torch.allclose(made.features, wanted, atol=1e-3)
    with pytest.raises(GroundingValueError, match="caption"):
        collect_anchors([{"image": picture(0)}], vision)
    with pytest.raises(GroundingValueError, match="at least one example"):
        collect_anchors([], vision)
