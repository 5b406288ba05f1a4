"""Ground a language model and train its adapter on a folder of images.

    python examples/train.py LM VISION_ENCODER FOLDER ADAPTER

FOLDER has images and a metadata.csv with the columns file_name and caption. LM and VISION_ENCODER are Hub ids or local
folders. ADAPTER is the folder that the adapter is saved in.
"""

import sys

from datasets import load_dataset

from visual_ground import GroundingTrainer, GroundingTrainingArguments, ground

lm, vision, folder, adapter = sys.argv[1:5]
model = ground(lm, vision)
model.print_trainable_parameters()
pairs = load_dataset("imagefolder", data_dir=folder, split="train")
args = GroundingTrainingArguments(output_dir=f"{adapter}-run", max_steps=5, per_device_train_batch_size=4)
GroundingTrainer(model, args, train_dataset=pairs).train()
model.save_pretrained(adapter)
