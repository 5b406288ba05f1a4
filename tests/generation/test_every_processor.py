"""No logits processor of transformers is left out of the tests: a new one has to be tried with images and `[RET]`."""

import inspect
import warnings

import pytest
import torch
from transformers import LogitsProcessor
from transformers.generation import logits_process
from transformers.generation.utils import GenerationMixin

from tests.generation.test_options import PROCESSORS, PROMPTS, ids_of
from tests.tiny import grounded

# Of models for sound and speech, which put them into their own `generate`.
OF_OTHER_MODELS = {
    "AlternatingCodebooksLogitsProcessor",
    "BarkEosPrioritizerLogitsProcessor",
    "ClassifierFreeGuidanceLogitsProcessor",
    "DiaClassifierFreeGuidanceLogitsProcessor",
    "DiaEOSChannelFilterLogitsProcessor",
    "DiaEOSDelayPatternLogitsProcessor",
    "WhisperNoSpeechDetection",
    "WhisperTimeStampLogitsProcessor",
}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # transformers' own advice on odd combinations
def test_the_calls_of_the_other_tests_go_through_every_processor(monkeypatch):
    kinds = {
        name
        for name, kind in vars(logits_process).items()
        if inspect.isclass(kind) and issubclass(kind, LogitsProcessor) and kind is not LogitsProcessor
    }
    reached, build = set(), GenerationMixin._get_logits_processor

    def noting(self, *args, **options):
        built = build(self, *args, **options)
        reached.update(type(one).__name__ for one in built)
        return built

    monkeypatch.setattr(GenerationMixin, "_get_logits_processor", noting)
    model = grounded("llama_untied")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for options in PROCESSORS.values():
            ids_of(model, PROMPTS["image"], max_new_tokens=2, **options)
    assert kinds - reached <= OF_OTHER_MODELS
