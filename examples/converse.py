"""Index a folder's images, then answer with them: text in, a picture in, and a request that follows a picture.

    python examples/converse.py LM ADAPTER FOLDER PAGE

FOLDER has .png files. The last answer is written to PAGE, an HTML file with its pictures inside.
"""

import sys
from pathlib import Path

from visual_ground import GroundedModel, ImageIndex

lm, adapter, folder, page = sys.argv[1:5]
model = GroundedModel.from_pretrained(lm, adapter)
images = sorted(str(path) for path in Path(folder).glob("*.png"))
index = ImageIndex.build(model, images, ids=[Path(image).stem for image in images])
index.save_pretrained(Path(folder) / "index")

prompts = [
    "Show me a picture.",
    ["Image of", images[0], ":"],
    [images[0], "Show me another one."],
]
# ret_bias is added to [RET]'s logit: the more, the more readily the model shows a picture.
answers = model.generate(prompts, index, max_new_tokens=16, max_images=1, ret_bias=20.0)
for answer in answers:
    print(answer)
answers[-1].save(page)
