import torch

from tests.tiny import grounded, picture
from visual_ground.vision.features.recent import RecentFeatures


def test_an_image_is_encoded_once_and_comes_back_in_its_place():
    encoded = []

    def encode(pixels):
        encoded.append(len(pixels))
        return pixels.flatten(1) * 2

    recent = RecentFeatures(encode, max_images=3)
    a, b, c, d = torch.randn(4, 3, 2, 2)
    for batch in ([a, b, a], [b, a], [c, b], [d], [d, c, b, a]):
        pixels = torch.stack(batch)
        assert torch.equal(recent(pixels), pixels.flatten(1) * 2)
    assert encoded == [2, 1, 1, 1] and len(recent) == 3


def test_the_same_bytes_of_another_shape_are_another_image():
    recent = RecentFeatures(lambda pixels: torch.full((len(pixels), 1), float(pixels.shape[-1])))
    assert float(recent(torch.zeros(1, 1, 2, 3))) == 3 and float(recent(torch.zeros(1, 1, 3, 2))) == 2


@torch.no_grad()
def test_a_conversation_encodes_each_picture_once():
    model, seen = grounded("llama_untied"), []
    model.vision.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    turn = ["w4", picture(0), "w5"]
    for _ in range(3):
        first = model.generate([turn], do_sample=False, max_new_tokens=2)
        turn = [*turn, picture(1), "w6"]
    assert seen == [1, 1] and first
