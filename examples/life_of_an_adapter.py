"""Ground, train, save, load, index, ask.

    python examples/life_of_an_adapter.py LM VISION_ENCODER FOLDER

FOLDER has images and a metadata.csv with the columns file_name and caption. Names are Hub ids or local folders.
"""

import sys
from pathlib import Path

from datasets import load_dataset

from visual_ground import GroundedModel, GroundingTrainer, GroundingTrainingArguments, ImageIndex, ground

lm, vision, folder = sys.argv[1:4]
out = Path(folder) / "out"

model = ground(lm, vision)
model.print_trainable_parameters()
pairs = load_dataset("imagefolder", data_dir=folder, split="train")
args = GroundingTrainingArguments(output_dir=str(out), max_steps=5, per_device_train_batch_size=4)
GroundingTrainer(model, args, train_dataset=pairs).train()
model.save_pretrained(out / "adapter")
model.unground()

model = GroundedModel.from_pretrained(lm, out / "adapter")
images = sorted(str(path) for path in Path(folder).glob("*.png"))
index = ImageIndex.build(model, images, ids=images)
index.save_pretrained(out / "index")
answer = model.generate([["Here is a picture:", images[0], "Show me another one."]], index, ret_bias=20.0, max_images=1)
print(answer[0])
answer[0].save(out / "answer.html")
