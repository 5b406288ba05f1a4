"""Loss and gradients stay finite over 200 steps, whatever the base's dtype and however large its embeddings.

The default run takes three cases, `make test-architectures` all.
"""

import math

import pytest
import torch

from tests.architectures.builder import VOCABULARY, build
from tests.tiny import Eye, image_processor, picture, tokenizer
from visual_ground import GroundingConfig, GroundingTrainer, GroundingTrainingArguments, ground

# Capped logits, scaled embeddings or logits, norms inside the embedding, state spaces, experts, tied and untied ends.
FAMILIES = (
    "bart", "bloom", "cohere", "deepseek_v3", "gemma2", "gemma3n_text", "gpt2", "granite", "llama", "mamba", "minicpm3",
    "mixtral", "opt", "qwen2",
)  # fmt: skip
QUICK = {("bloom", "bfloat16"), ("gemma2", "float16"), ("minicpm3", "float32")}
DTYPES, NORMS = ("float32", "bfloat16", "float16"), (0.02, 1.0, 50.0)
# Every family in every dtype, every dtype with every norm.
CASES = [(m, dtype, NORMS[(i + j) % 3]) for i, m in enumerate(FAMILIES) for j, dtype in enumerate(DTYPES)]
ROWS = [{"image": picture(i), "caption": f"w{10 + i} w{20 + 2 * i} w9"} for i in range(12)]


@torch.no_grad()
def base(model_type: str, dtype: str, norm: float) -> torch.nn.Module:
    """Return a tiny LM whose embedding rows have this norm on average."""
    lm = build(model_type)
    rows = lm.get_input_embeddings().weight
    rows.mul_(norm / rows.norm(dim=-1).mean())
    return lm.to(getattr(torch, dtype))


@pytest.mark.filterwarnings("ignore")  # what transformers' own models warn of is theirs
@pytest.mark.parametrize(
    ("model_type", "dtype", "norm"),
    [pytest.param(*case, marks=() if case[:2] in QUICK else pytest.mark.architectures) for case in CASES],
)
def test_two_hundred_steps_stay_finite(model_type, dtype, norm, tmp_path):
    lm = base(model_type, dtype, norm)
    assert torch.isfinite(lm(input_ids=torch.tensor([[5, 6, 7]])).logits).all(), "the base itself overflows"
    config = GroundingConfig(retrieval_dim=6, caption_prompt="w7 w8", image_prompt="w7 {image} w8")
    model = ground(lm, Eye(), tokenizer(VOCABULARY), image_processor, config)
    args = GroundingTrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=200,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        logging_steps=20,
        seed=0,
    )
    # A loss or gradient that is not finite stops the training with an error.
    trainer = GroundingTrainer(model, args, ROWS)
    trainer.train()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 10 and all(map(math.isfinite, history)) and min(history[5:]) < history[0]
    for name, value in model.adapter.state_dict().items():
        assert value.dtype == torch.float32 and torch.isfinite(value).all(), name
    assert next(model.lm.parameters()).dtype == getattr(torch, dtype)
