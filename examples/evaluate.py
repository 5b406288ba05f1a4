"""How well does an adapter find images for captions, captions for images, and tell a true image from a wrong one?

    python examples/evaluate.py LM ADAPTER FOLDER

FOLDER has images and a metadata.csv with the columns file_name and caption.
"""

import sys

from datasets import load_dataset

from visual_ground import GroundedModel
from visual_ground.evaluation.retrieval import caption_pair_accuracy, retrieval_recall

lm, adapter, folder = sys.argv[1:4]
model = GroundedModel.from_pretrained(lm, adapter)
pairs = load_dataset("imagefolder", data_dir=folder, split="train")
features = model.vision(model.vision.preprocess(pairs["image"][:]))
captions = pairs["caption"][:]
print(retrieval_recall(model, captions, features))
print("a true image beats a wrong one in", caption_pair_accuracy(model, captions, features), "% of cases")
