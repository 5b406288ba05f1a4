"""Write docs/vision.md from docs/vision.json, which `make test-vision` records.

python -m benchmarks.vision_page
"""

import json
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"

OPENING = """# Any vision encoder

`ground(lm, encoder)` takes

- a Hub id or a folder of transformers, or `NAME#SUBMODULE` for a part of such a model,
- `"open_clip:ARCHITECTURE/PRETRAINED"` (also `hf-hub:` names),
- `"timm:NAME"`,
- weights of your own: `"timm:NAME/FILE"` and `"open_clip:ARCHITECTURE/FILE"` for a `.safetensors`, `.pth`, `.pt` or
  `.bin` file, `"timm:FOLDER"` and `"open_clip:FOLDER"` for a folder that these libraries saved. An absolute path
  follows the slash: `"timm:vit_tiny_patch16_224//home/me/vit.safetensors"`. On the command line, `--vision` takes any
  of these names, and the adapter keeps the name when it is saved,
- a loaded model of one of these, or any module from pixels (n, c, h, w) to features.

```python
from visual_ground import GroundingConfig, ground

model = ground("HuggingFaceTB/SmolLM2-135M-Instruct", "open_clip:ViT-B-32/laion2b_s34b_b79k")

config = GroundingConfig(num_visual_tokens=16, visual_tokens_from="patches")
with_patches = ground("Qwen/Qwen2.5-0.5B-Instruct", "facebook/dinov2-small", config=config)
```

- **Width.** It is found by running a grey image. To give it by hand, pass `VisionEncoder(module, processor,
  feature_dim=512)` from `visual_ground.vision.encoder`.
- **Preprocessing.** It is what was saved with the checkpoint; else what timm or open_clip say of the model; else,
  with a warning, what transformers has for its kind. To give it by hand, pass `image_processor=`, which maps a list
  of PIL images to `{"pixel_values": (n, c, h, w)}`. If a processor keeps each image's own shape, images are made
  square first, so that an image's features never depend on its batch.
- **Features.** They are the image features of a whole text-and-image model, what comes before a classifier,
  `pooler_output`, or the mean of the last tokens or of the last feature map: the first of these that exists. A pooler
  that is missing from a checkpoint would be random; it is named in a warning and not used.
- **Patches.** With `visual_tokens_from="patches"`, each image token is made from its own part of the picture (with 16
  tokens: 4 x 4 parts), as the mean of that part's patches, through one linear layer that all parts share. The
  retrieval vector is made from the pooled features either way. The feature cache then holds both.
- **Random masks.** An encoder that hides random patches in training (`vit_mae`) sees whole images. One that gives
  different features for the same image for any other reason is refused.
- **Refused**, with the reason: models of videos, text or sound, processors that cut an image into several tiles, and
  feature maps whose feature axis cannot be told.

The tables below were recorded by `make test-vision` with {versions}: random weights, full width, few layers. An
encoder is listed if the features of two pictures are finite, have a width that its own settings name, and are the
same alone as in a batch. A name that is not listed has not been tried. *f* is the width of the features; *parts* is
the width of a part with `visual_tokens_from="patches"`.
"""


def page() -> str:
    """Return the text of docs/vision.md."""
    results = json.loads((DOCS / "vision.json").read_text())
    versions = results.pop("versions")
    listed = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    text = [OPENING.replace("{versions}", listed)]
    for group, rows in results.items():
        good = {name: row for name, row in rows.items() if "width" in row}
        text += [
            f"## {group[0].upper()}{group[1:]}: {len(good)} of {len(rows)}",
            "",
            "| name | class | f | parts |",
            "|---|---|---|---|",
        ]
        text += [
            f"| {name} | {row['model']} | {row['width']} | {row['patch_width'] or 'none'} |"
            for name, row in good.items()
        ]
        text += [""]
        if refused := {name: row for name, row in rows.items() if "width" not in row}:
            text += ["| refused | why |", "|---|---|"]
            text += [f"| {name} | {row['reason']} |" for name, row in refused.items()]
            text += [""]
    return "\n".join(text).rstrip() + "\n"


if __name__ == "__main__":
    (DOCS / "vision.md").write_text(page())
