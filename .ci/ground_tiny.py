"""Ground a tiny random LM, answer, save and load, with the visual_ground that is installed in this environment."""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import visual_ground
from visual_ground import GroundedModel, ImageIndex, ground

SIZE = 8
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *"a an cat dog house image of on picture show the".split()]


class Encoder(nn.Module):
    """Pixels (n, 3, SIZE, SIZE) to features (n, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * SIZE * SIZE, 12)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return one linear map of the pixels."""
        return self.layer(pixels.flatten(1))


def image_processor(images: list[Image.Image], return_tensors: str = "pt") -> dict[str, torch.Tensor]:
    """Resize images and scale them to [-1, 1]."""
    arrays = [np.asarray(image.convert("RGB").resize((SIZE, SIZE)), dtype=np.float32) / 127.5 - 1 for image in images]
    return {"pixel_values": torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)}


def language_model() -> LlamaForCausalLM:
    """Return a random Llama of two layers."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **sizes, **ids)).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def main() -> None:
    """Raise where the installed package is another one than it should be, or does not work."""
    home = Path(visual_ground.__file__).resolve()
    assert home.is_relative_to(Path(sys.prefix).resolve()), f"visual_ground is {home}, not what was installed"
    for name in visual_ground.__all__:
        getattr(visual_ground, name)
    torch.manual_seed(0)
    lm, encoder = language_model(), Encoder()
    pictures = [Image.new("RGB", (SIZE, SIZE), colour) for colour in ("red", "green", "blue")]
    model = ground(lm, encoder, tokenizer(), image_processor).eval()
    index = ImageIndex.build(model, pictures)
    prompt = [[pictures[0], "show the picture"]]
    answer = model.generate(prompt, index, ret_bias=1000.0, max_new_tokens=3, max_images=1, do_sample=False)[0]
    assert len(answer.images) == 1, answer
    model.save_pretrained("adapter")
    model.unground()
    loaded = GroundedModel.from_pretrained(lm, "adapter", encoder, tokenizer(), image_processor)
    again = loaded.generate(prompt, index, ret_bias=1000.0, max_new_tokens=3, max_images=1, do_sample=False)[0]
    assert str(again) == str(answer), (str(answer), str(again))
    print(f"visual_ground in {home.parent} answers: {answer}")


if __name__ == "__main__":
    main()
