"""Write docs/vision.md from docs/vision.json, which `make test-vision` records.

python -m benchmarks.vision_page
"""

import json
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"

OPENING = """# Any vision encoder

`ground(lm, encoder)` takes a Hub id or a folder, `"open_clip:ARCHITECTURE/PRETRAINED"` (also `hf-hub:` and a file of
weights), `"timm:NAME"`, a loaded model of one of these, or any module from pixels (n, c, h, w) to features.

- **Width** is found by running a grey image. Given by hand: `ground(lm, VisionEncoder(module, processor,
  feature_dim=512))` with `visual_ground.vision.encoder.VisionEncoder`.
- **Preprocessing** is what was saved with the checkpoint; else what timm or open_clip say of the model; else, with a
  warning, that of its kind in transformers. Given by hand: `image_processor=`, which maps a list of PIL images to
  `{"pixel_values": (n, c, h, w)}`. Where a processor keeps each image's own shape, images are made squares first, so
  that an image's features never depend on the batch that it is in.
- **Features** are the image features of whole text-and-image models, what comes before a classifier, `pooler_output`,
  or the mean of the last tokens or of the last map, whichever comes first. A pooler that a checkpoint lacks would be
  random: it is named in a warning and not used.
- **Patches**: `GroundingConfig(num_visual_tokens=16, visual_tokens_from="patches")` makes each of an image's rows of
  its own part of the picture, the mean of that part's patches (4 x 4 parts here), through one linear layer that all
  parts share. The retrieval vector is of the pooled features either way. A cached row then holds the pooled features
  and all parts.
- **Random masks**: an encoder that hides patches at random as it was trained (`vit_mae`) is shown whole images; one
  that gives other features for the same image for another reason is refused.
- **Refused**, with the reason: models of videos, text or sound, processors that make several tiles of an image, maps
  in which the axis of the features cannot be told.

The tables below were recorded by `make test-vision` with {versions}: random weights, full width, few layers. An encoder
is in them if the features of two pictures are finite, of a width that its own settings name, and the same alone as in a
batch. A name that is not below has not been tried in this form. "Parts" is the width of a part with
`visual_tokens_from="patches"`.
"""


def page() -> str:
    """Return the text of docs/vision.md."""
    results = json.loads((DOCS / "vision.json").read_text())
    versions = results.pop("versions")
    told = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    text = [OPENING.replace("{versions}", told)]
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
