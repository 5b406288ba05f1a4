"""Whether more concepts, of clip art, tell more caption pairs of emoji: by the retrieval space, and by image tokens.

    apt-get install openclipart-svg tuxpaint-stamps-default wamerican
    RECIPE_CACHE=demo/cache python more_concepts.py

Debian's clip art is drawn in other styles than emoji, and has photographs. Its titles are names where all their words
are English ones and none is in the name of a concept that is measured. The measure is that of imitation_loss.py: four
fifths of the training families are fitted, without and with the clip art, and all other families measured.
Float32. Writes results/more_concepts.json.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import defaultdict
from pathlib import Path

import torch
from data import Data
from fitting import unit
from image_tokens import Captioner
from imitation_loss import KEPT, Study
from lm import CACHE, Kept, States, load
from PIL import Image, UnidentifiedImageError

from visual_ground import GroundingConfig
from visual_ground.demo import emoji
from visual_ground.demo.weights import load_vision
from visual_ground.vision.features.cache import FeatureCache

CLIP_ART, STAMPS = Path("/usr/share/openclipart/svg"), Path("/usr/share/tuxpaint/stamps")
DICTIONARY = Path("/usr/share/dict/american-english")
# Screen icons, flags and patterns, of which there are thousands.
LEFT_OUT = {"computer", "shapes", "signs_and_symbols", "logos", "buttons", "geography", "symbols", "military"}
NOT_NAMES = set(
    "pattern patterns clipart cliparts various untitled unsorted menu card another outline contour logo sign".split()
)
LARGEST_FILE, PICTURES_A_NAME = 400_000, 4


def name_in(title: str) -> str:
    """Return what a title or the beginning of a description calls a thing."""
    title = re.split(r"[.,;:!?—–(]| is | lets | used | carries | are ", title)[0]
    title = re.sub(r"\b(clip ?art|svg|icon|by|vector)\b.*", "", re.sub(r"[_\-]+", " ", title), flags=re.IGNORECASE)
    words = re.sub(r"[^A-Za-z ]+", " ", title).lower().split()
    return " ".join(words[1:] if words[:1] in (["a"], ["an"], ["the"], ["some"]) else words)


def sources() -> dict[str, list[Path]]:
    """Return the pictures of each name."""
    known, found = set(DICTIONARY.read_text().lower().split()), defaultdict(list)
    for path in sorted(CLIP_ART.rglob("*.svg")):
        if path.relative_to(CLIP_ART).parts[0] not in LEFT_OUT and path.stat().st_size < LARGEST_FILE:
            if title := re.search(r"<dc:title>(.*?)</dc:title>", path.read_text(errors="ignore"), re.DOTALL):
                found[name_in(title[1].strip())].append(path)
    for path in sorted(STAMPS.rglob("*.txt")):
        pictures = [p for p in (path.with_suffix(".svg"), path.with_suffix(".png")) if p.exists()]
        if pictures and path.relative_to(STAMPS).parts[0] not in LEFT_OUT:
            found[name_in(path.read_text(errors="ignore").partition("\n")[0])].append(pictures[0])
    named = {name: paths[:PICTURES_A_NAME] for name, paths in found.items() if name and len(name.split()) <= 4}
    return {n: p for n, p in named.items() if emoji.content_words(n) and all(w in known - NOT_NAMES for w in n.split())}


def draw(path: Path, folder: Path, size: int = 224) -> str | None:
    """Draw on white; return the PNG's path, or None of what cannot be read."""
    import resvg_py

    out = folder / f"{hashlib.sha256(str(path).encode()).hexdigest()[:16]}.png"
    if not out.exists():
        try:
            data = path.read_bytes()
            if path.suffix == ".svg":
                data = bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=size))
            drawn = Image.open(io.BytesIO(data)).convert("RGBA")
        except (ValueError, RuntimeError, UnidentifiedImageError):
            return None
        box = drawn.getchannel("A").getbbox()
        if box is None:
            return None
        drawn = drawn.crop(box)
        scale = 0.9 * size / max(drawn.size)
        drawn = drawn.resize([max(1, round(scale * side)) for side in drawn.size])
        page = Image.new("RGBA", (size, size), "white")
        page.alpha_composite(drawn, ((size - drawn.width) // 2, (size - drawn.height) // 2))
        page.convert("RGB").save(out)
    return str(out)


class WithClipArt(Study):
    """As `Study`, fitted to clip art too."""

    def __init__(self, lm: torch.nn.Module, data: Data, captioner: Captioner) -> None:
        super().__init__(lm, data, captioner)
        measured = set().union(*(emoji.content_words(data.concepts[i].name) for i in self.held_out))
        folder = CACHE / "recipe" / "clip_art"
        folder.mkdir(parents=True, exist_ok=True)
        pictures = {
            name: [png for path in paths if (png := draw(path, folder))]
            for name, paths in sources().items()
            if not emoji.content_words(name) & measured
        }
        pictures = {name: paths for name, paths in pictures.items() if paths}
        first, cache = len(data.concepts), FeatureCache(CACHE / "features", load_vision())
        own = [[paths[n % len(paths)] for n in range(len(emoji.STYLES))] for paths in pictures.values()]
        features = cache.features([path for pair in own for path in pair]).float().view(len(own), len(emoji.STYLES), -1)
        data.concepts = [*data.concepts, *(emoji.Concept(f"x{n}", n, (), "train", "picture") for n in pictures)]
        data.features = torch.cat([data.features, features])
        self.captions = [data.captions(kind) for kind in (0, 1)]
        states = Kept(folder, States(lm, self.table.weight.mean(0)))
        for kind, name in enumerate(KEPT):
            texts = [data.caption(text) for text in self.captions[kind][first:]]
            read = states.get(f"{name}_{len(own)}", texts, {"looks": data.ids(" It looks like a")}, 1)["looks"]
            self.texts[kind] = torch.cat([self.texts[kind], unit(read[:, -1].float())])
        self.fit_to([*self.fitted, *range(first, first + len(own))])


def main() -> None:
    """Measure without and with clip art, write."""
    lm, tokenizer = load("smollm2")
    found = {}
    for kind in (Study, WithClipArt):
        data = Data(tokenizer)
        study = kind(lm, data, Captioner(lm, tokenizer, data, GroundingConfig().image_prompt))
        imitated = study.imitate(0, "distances")
        found[kind.__name__] = {
            "concepts": len(study.fitted),
            "imitation": study.pairs(*imitated),
            "captioning_steps": study.pairs(*study.captioned(*imitated)),
            "shared_space": study.shared(),
        }
        print(found, flush=True)
    (Path(__file__).parent / "results" / "more_concepts.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
