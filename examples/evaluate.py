"""How well does an adapter find images for captions, captions for images, and tell a true image from a wrong one?

    python examples/evaluate.py LM ADAPTER FOLDER

FOLDER has images and a metadata.csv with the columns file_name and caption.
"""

import sys

from datasets import load_dataset

from visual_ground import GroundedModel
from visual_ground.evaluation import CaptionPairEvaluator, EvaluationPairs, RetrievalEvaluator

lm, adapter, folder = sys.argv[1:4]
model = GroundedModel.from_pretrained(lm, adapter)
pairs = load_dataset("imagefolder", data_dir=folder, split="train")
pairs = EvaluationPairs(pairs)  # so that both evaluators encode the images once
for evaluator in (RetrievalEvaluator(pairs), CaptionPairEvaluator(pairs)):
    print(evaluator.name, evaluator(model))
