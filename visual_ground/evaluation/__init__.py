"""Evaluators: callables from a grounded model to named numbers, and the metrics that they are made of."""

from visual_ground.evaluation.base import Evaluator
from visual_ground.evaluation.captions import CaptionPairEvaluator, caption_pair_accuracy
from visual_ground.evaluation.metrics import recall_at
from visual_ground.evaluation.pairs import EvaluationPairs
from visual_ground.evaluation.retrieval import RetrievalEvaluator, retrieval_recall

__all__ = [
    "CaptionPairEvaluator",
    "EvaluationPairs",
    "Evaluator",
    "RetrievalEvaluator",
    "caption_pair_accuracy",
    "recall_at",
    "retrieval_recall",
]
