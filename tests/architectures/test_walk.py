"""Law i over every entry of transformers' causal-LM mapping; a new entry is picked up by itself.

The default run takes a spread of families; `make test-architectures` takes all, and writes docs/support.json and
docs/support.md (see conftest.py).
"""

import pytest
import torch

from tests.architectures.builder import ARCHITECTURES, build
from tests.architectures.checks import PROPERTIES, TEXT, BaseCannot, Case
from visual_ground.errors import GroundingTypeError

# Each differs from all others in how ids come in, how states go through, or how logits come out.
SPREAD = {
    "bart", "bloom", "blt", "cpmant", "deepseek_v3", "falcon", "gemma2", "gemma3n_text", "gemma4_assistant",
    "gemma4_text", "gpt2", "granitemoehybrid", "inkling2_text", "inkling_text", "llama", "mamba", "mllama", "musicgen",
    "opt", "prophetnet", "qwen4_exp_text", "recurrent_gemma", "reformer", "roberta", "rwkv", "xlm", "xlnet",
}  # fmt: skip


def examine(model_type: str) -> dict[str, str]:
    """Return what each property came to: "yes", "base cannot: ..." or "no: ..."; or the reason of a refusal."""
    try:
        case = Case(model_type)
    except GroundingTypeError as error:
        return {"refused": str(error)}
    found = {}
    for name, check in PROPERTIES.items():
        try:
            check(case)
            found[name] = "yes"
        except BaseCannot as reason:
            found[name] = f"base cannot: {reason}"
        except Exception as error:  # whatever it is, it is this property's result, and the others are still of interest
            found[name] = f"no: {type(error).__name__}: {error}"[:300]
    return found


@pytest.mark.filterwarnings("ignore")  # what transformers' own models warn of is theirs
@pytest.mark.parametrize(
    "model_type", [pytest.param(m, marks=() if m in SPREAD else pytest.mark.architectures) for m in ARCHITECTURES]
)
def test_what_the_base_can_the_grounded_one_can(model_type, record_property):
    found = examine(model_type)
    record_property("support", [model_type, found])
    if "refused" in found:
        assert not reads_text(build(model_type)), f"it is a language model, and was refused: {found['refused']}"
    assert not {name: result for name, result in found.items() if result.startswith("no: ")}


@torch.no_grad()
def reads_text(base):
    """Whether a model makes one row of logits for each token of a text."""
    try:
        return base(input_ids=TEXT).logits.shape[:2] == TEXT.shape
    except Exception:  # whatever it raises, it is no language model
        return False
