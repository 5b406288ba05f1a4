"""Miniature benchmarks in their official files, in words that the tiny tokenizer knows, with random pictures."""

import json
from pathlib import Path

from tests.tiny import picture


def write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def paint(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path)


def vqa_people(*answers: str) -> list[dict]:
    """Return ten people's answers: those given, and the last for everybody else."""
    told = [*answers, *[answers[-1]] * (10 - len(answers))]
    return [{"answer": one, "answer_confidence": "yes", "answer_id": i + 1} for i, one in enumerate(told)]


def vqa(folder: Path, split: str = "val2014", number: int = 6) -> Path:
    """Write VQAv2's questions, annotations and images; question i is answered w{20 + i % 3} by most people."""
    questions, annotations = [], []
    for i in range(number):
        image_id, question_id = 40 + i // 2, 400 + i
        common = f"w{20 + i % 3}"
        questions.append({"image_id": image_id, "question": f"w{10 + i} w5", "question_id": question_id})
        annotations.append(
            {
                "question_id": question_id,
                "image_id": image_id,
                "question_type": "what is",
                "answer_type": ("yes/no", "number", "other")[i % 3],
                "multiple_choice_answer": common,
                "answers": vqa_people(*["w30"] * (i % 4), common),
            }
        )
        paint(folder / f"{split}/COCO_{split}_{image_id:012d}.jpg", image_id)
    about = {"info": {"version": "2.0", "year": 2017}, "data_type": "mscoco", "data_subtype": split}
    write(folder / f"v2_OpenEnded_mscoco_{split}_questions.json", {**about, "questions": questions})
    write(folder / f"v2_mscoco_{split}_annotations.json", {**about, "annotations": annotations})
    return folder


def coco_captions(folder: Path, split: str = "val2017", number: int = 5) -> Path:
    """Write COCO's captions; image i has i + 1 of them."""
    images, annotations = [], []
    for i in range(number):
        images.append({"id": 70 + i, "file_name": f"{70 + i:012d}.jpg"})
        for j in range(i + 1):
            caption = f"w{10 + i} w{20 + j} w9 w{30 + i} ."
            annotations.append({"image_id": 70 + i, "id": len(annotations), "caption": caption})
        paint(folder / split / f"{70 + i:012d}.jpg", i)
    write(folder / f"annotations/captions_{split}.json", {"images": images, "annotations": annotations})
    return folder


def cirr(folder: Path, split: str = "val", number: int = 8) -> Path:
    """Write CIRR's queries: each image asks for the next one, and the six from it on are similar."""
    names = [f"{split}-{i}-0-img0" for i in range(number)]
    queries = []
    for i in range(number):
        members = [names[(i + j) % number] for j in range(6)]
        query = {
            "pairid": 9 + i,
            "reference": names[i],
            "caption": f"w{10 + i} w6",
            "img_set": {"id": i, "members": members, "reference_rank": 0},
        }
        if split != "test1":
            query |= {"target_hard": members[1], "target_soft": {members[1]: 1.0, members[2]: -1.0}}
        queries.append(query)
        paint(folder / f"dev/{names[i]}.png", i)
    write(folder / f"cirr/captions/cap.rc2.{split}.json", queries)
    write(folder / f"cirr/image_splits/split.rc2.{split}.json", {name: f"./dev/{name}.png" for name in names})
    return folder


def circo(folder: Path, split: str = "val", number: int = 8) -> Path:
    """Write CIRCO's queries: image i asks for the next i % 3 + 1."""
    images = [{"id": 500 + i, "file_name": f"{500 + i:012d}.jpg", "height": 8, "width": 8} for i in range(number)]
    queries = []
    for i in range(number):
        query = {"reference_img_id": 500 + i, "relative_caption": f"w{10 + i} w6", "shared_concept": "w7", "id": i}
        if split == "val":
            right = [500 + (i + j) % number for j in range(1, i % 3 + 2)]
            query |= {"target_img_id": right[0], "gt_img_ids": right, "semantic_aspects": ["cardinality"]}
        queries.append(query)
        paint(folder / f"COCO2017_unlabeled/unlabeled2017/{500 + i:012d}.jpg", i)
    write(folder / f"annotations/{split}.json", queries)
    write(folder / "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json", {"images": images})
    return folder


def fashioniq(folder: Path, split: str = "val", number: int = 6) -> Path:
    """Write FashionIQ's three categories: each image asks for the next one."""
    for kind, category in enumerate(("dress", "shirt", "toptee")):
        names = [f"B{kind}{i:04d}" for i in range(number)]
        queries = []
        for i in range(number):
            query = {"candidate": names[i], "captions": [f"w{10 + i} w6.", f"w{20 + kind}"]}
            queries.append(query if split == "test" else {**query, "target": names[(i + 1) % number]})
            paint(folder / f"images/{names[i]}.png", 10 * kind + i)
        write(folder / f"captions/cap.{category}.{split}.json", queries)
        write(folder / f"image_splits/split.{category}.{split}.json", names)
    return folder


def edit(path: Path, change) -> None:
    """Let a function change what a JSON file holds."""
    content = json.loads(path.read_text(encoding="utf-8"))
    changed = change(content)
    write(path, content if changed is None else changed)
