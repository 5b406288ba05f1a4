import pytest
import torch

from tests.tiny import Eye, grounded, image_processor, tokenizer
from visual_ground import GroundedModel, GroundingConfig
from visual_ground.adapter.adapter import Adapter
from visual_ground.adapter.initialization import initialize_from_statistics, standardize_features
from visual_ground.lm.base.weights import EmbeddingStatistics


def make():
    return Adapter(GroundingConfig(num_visual_tokens=2, retrieval_dim=6), 8, 5, (7,), 7, tied=False)


def test_shapes_and_unit_length():
    adapter = make()
    assert adapter.image_tokens(torch.randn(3, 5)).shape == (6, 8)
    for vectors in (adapter.embed_images(torch.randn(3, 5)), adapter.embed_states([torch.randn(3, 7)])):
        assert vectors.shape == (3, 6) and torch.allclose(vectors.norm(dim=-1), torch.ones(3))


def test_image_rows_start_with_the_embedding_s_statistics():
    torch.manual_seed(0)
    table, features = torch.randn(4000, 8) * torch.arange(1, 9) + 3, torch.randn(5000, 5) * 7 + 2
    adapter = Adapter(GroundingConfig(), 8, 5, (8,), 8, tied=True)
    initialize_from_statistics(adapter, EmbeddingStatistics.of(table.split(999)), None)
    standardize_features(adapter, features)
    rows = adapter.image_tokens(features).detach()
    assert torch.allclose(rows.mean(0), table.mean(0), atol=0.3)
    assert 0.05 < float((rows.std(0) / table.std(0)).square().mean().sqrt()) < 0.17


def test_ret_starts_along_the_mean_at_the_mean_norm():
    table, head = torch.randn(50, 8) + 1, torch.randn(50, 7) + 1
    adapter = make()
    initialize_from_statistics(adapter, EmbeddingStatistics.of([table]), EmbeddingStatistics.of([head]))
    for row, rows in zip(adapter.ret_embeddings(), (table, head), strict=True):
        assert torch.allclose(row.norm(), rows.norm(dim=-1).mean(), atol=1e-4)
        assert torch.allclose(torch.cosine_similarity(row, rows.mean(0), dim=0), torch.tensor(1.0), atol=1e-5)


def test_tied_rows_are_one_tensor():
    adapter = Adapter(GroundingConfig(), 8, 5, (8,), 8, tied=True)
    assert adapter.ret_embeddings()[0] is adapter.ret_embeddings()[1]
    assert "ret_output" not in adapter.state_dict()


@pytest.mark.parametrize(("tied_ret", "names"), [(True, {"ret_input"}), (False, {"ret_input", "ret_output"})])
def test_ret_has_two_embeddings_unless_both_the_lm_and_the_settings_tie_it(tied_ret, names):
    adapter = grounded("qwen2_tied", tied_ret=tied_ret).adapter
    assert names == {name for name in adapter.state_dict() if name in ("ret_input", "ret_output")}
    assert "ret_output" in grounded("llama_untied", tied_ret=tied_ret).adapter.state_dict()
    assert GroundingConfig.preset("fromage").tied_ret and not GroundingConfig().tied_ret


def test_what_was_fitted_for_good_is_not_trained_after_loading_or_switching(tmp_path):
    model = grounded("llama_untied")
    model.adapter.keep(["ret_input", "ret_output"])
    trained = {name for name, parameter in model.adapter.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.adapter.named_parameters()} - {"ret_input", "ret_output"}
    model.save_pretrained(tmp_path)
    model.add_adapter("other", model.config)
    model.set_adapter("other")
    model.set_adapter("default")
    assert {name for name, parameter in model.adapter.named_parameters() if parameter.requires_grad} == trained
    lm, parts = model.unground(), (Eye(), tokenizer(), image_processor)
    for is_trainable in (True, False):
        again = GroundedModel.from_pretrained(lm, tmp_path, *parts, is_trainable=is_trainable)
        found = {name for name, parameter in again.adapter.named_parameters() if parameter.requires_grad}
        assert found == (trained if is_trainable else set())
        again.unground()
