"""Toy scenes, written as other programs write masks."""

import base64
import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from probes.cli import main
from probes.data.folder import FolderDataset

CLASSES = ["sky", "tree", "car", "road"]
IDS = [2, 3, 11, 90]  # with gaps, as COCO's
COLOURS = [(70, 130, 180), (107, 142, 35), (0, 0, 142), (128, 64, 128)]
SIZE = (40, 60)  # rows, columns


class Scene(NamedTuple):
    """A photo, uint8[H, W, 3], and the class of each pixel, [H, W]."""

    name: str
    photo: np.ndarray
    classes: np.ndarray


def scenes(count: int = 3, classes: int = 4, seed: int = 0) -> dict[str, list[Scene]]:
    """Scenes of both splits: rectangles of all classes on a ground of class 0."""
    rng = np.random.default_rng(seed)
    splits: dict[str, list[Scene]] = {"training": [], "validation": []}
    for split, part in splits.items():
        for i in range(count):
            target = np.zeros(SIZE, np.int64)
            for k in rng.permutation(classes):
                top, left = rng.integers(0, SIZE[0] - 8), rng.integers(0, SIZE[1] - 8)
                target[top : top + 12, left : left + 15] = k
            photo = rng.integers(0, 256, (*SIZE, 3), np.uint8)
            part.append(Scene(f"{split[0]}{i}", photo, target))
    return splits


def save(file: Path, array: np.ndarray) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(file)
    return file


def convert(words: list[str], out: Path) -> dict[str, FolderDataset]:
    main(["masks", *words, "--out", str(out)])
    return {split: FolderDataset(out, split) for split in ("training", "validation")}


def write_colour(root: Path, splits: dict[str, list[Scene]]) -> list[str]:
    """CVAT's "Segmentation mask": a label map, photos, colour masks and lists of splits."""
    lines = [f"{name}:{','.join(map(str, c))}::" for name, c in zip(CLASSES, COLOURS, strict=True)]
    root.mkdir()
    (root / "labelmap.txt").write_text("\n".join(["# label:color_rgb:parts:actions", *lines]))
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    for split, part in splits.items():
        for scene in part:
            save(root / f"JPEGImages/{scene.name}.png", scene.photo)
            save(root / f"SegmentationClass/{scene.name}.png", np.uint8(COLOURS)[scene.classes])
        names = "\n".join(scene.name for scene in part)
        (lists / f"{split.removesuffix('ing').removesuffix('idation')}.txt").write_text(names)
    return [str(root)]


def write_palette(root: Path, splits: dict[str, list[Scene]]) -> list[str]:
    """Palette PNG, whose colours classes.json has."""
    root.mkdir()
    content = {"classes": CLASSES, "palette": COLOURS}
    (root / "classes.json").write_text(json.dumps(content))
    for split, part in splits.items():
        for scene in part:
            save(root / f"images/{split}/{scene.name}.png", scene.photo)
            mask = Image.fromarray(scene.classes.astype(np.uint8) + 5).convert("P")
            mask.putpalette([0] * 15 + [c for colour in COLOURS for c in colour])
            (root / f"masks/{split}").mkdir(parents=True, exist_ok=True)
            mask.save(root / f"masks/{split}/{scene.name}.png")
    return [str(root)]


def header(part: list[Scene]) -> dict:
    """What all of COCO's JSON begins with."""
    categories = [{"id": i, "name": name} for i, name in zip(IDS, CLASSES, strict=True)]
    rows, columns = SIZE
    images = [
        {"id": 7 * i, "file_name": f"{scene.name}.png", "height": rows, "width": columns}
        for i, scene in enumerate(part)
    ]
    # not in the order of their ids
    return {"images": images, "categories": categories[::-1]}


def write_panoptic(root: Path, splits: dict[str, list[Scene]]) -> list[str]:
    """COCO's panoptic JSON: segments of 24 bits, of which the first is not listed where `classes` is negative."""
    words = []
    for split, part in splits.items():
        annotations = []
        for i, scene in enumerate(part):
            save(root / f"photos/{scene.name}.png", scene.photo)
            segments = np.where(scene.classes < 0, 77, 1_000_003 * (scene.classes + 1))
            colours = np.stack([segments >> 8 * k & 255 for k in range(3)], -1)
            save(root / f"panoptic_{split}/{scene.name}.png", colours.astype(np.uint8))
            segments_info = [
                {"id": int(1_000_003 * (k + 1)), "category_id": IDS[k]}
                for k in np.unique(scene.classes)
                if k >= 0
            ]
            file = {"image_id": 7 * i, "file_name": f"{scene.name}.png"}
            annotations.append(file | {"segments_info": segments_info})
        content = header(part) | {"annotations": annotations}
        words.append(f"{split}={write_json(root / f'panoptic_{split}.json', content)}")
    return [*words, "--images", str(root / "photos")]


def write_json(file: Path, content: dict) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def write_ade20k(root: Path, splits: dict[str, list[Scene]]) -> list[str]:
    """ADE20K in full: class = R // 10 * 256 + G, and instances in B."""
    for split, part in splits.items():
        for scene in part:
            number = scene.classes + 500
            instances = np.arange(number.size).reshape(SIZE) % 256
            colours = np.stack([number // 256 * 10 + 3, number % 256, instances], -1)
            folder = root / f"images/{split}/outdoor"
            save(folder / f"{scene.name}_seg.png", colours.astype(np.uint8))
            save(folder / f"{scene.name}.jpg", scene.photo)
            objects = [{"name": name, "name_ndx": 500 + k} for k, name in enumerate(CLASSES)]
            write_json(folder / f"{scene.name}.json", {"annotation": {"object": objects}})
    return [str(root), "--unlabelled", "ignore"]


def write_datasets(root: Path, splits: dict[str, list[Scene]]) -> list[str]:
    """A data set that the library has saved, with a column of masks."""
    import datasets

    def encoded(array: np.ndarray) -> dict:
        content = io.BytesIO()
        Image.fromarray(array).save(content, "PNG")
        return {"bytes": content.getvalue(), "path": None}

    features = datasets.Features(image=datasets.Image(), annotation=datasets.Image())
    parts = {
        {"training": "train"}.get(split, split): datasets.Dataset.from_dict(
            {
                "image": [encoded(scene.photo) for scene in part],
                "annotation": [encoded(scene.classes.astype(np.uint16)) for scene in part],
            },
            features,
        )
        for split, part in splits.items()
    }
    datasets.DatasetDict(parts).save_to_disk(str(root))
    names = {str(k): name for k, name in enumerate(CLASSES)}
    write_json(root / "id2label.json", names)
    return [str(root), "--mask_column", "annotation", "--unlabelled", "ignore"]


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run lengths: down the columns, background first."""
    flat = mask.ravel(order="F")
    ends = [*np.flatnonzero(flat[1:] != flat[:-1]) + 1, len(flat)]
    return [0] * int(flat[0]) + np.diff([0, *ends]).tolist()


def write_coco(root: Path, splits: dict[str, list[Scene]]) -> list[str]:
    """As Roboflow exports COCO, with run lengths."""
    for split, part in splits.items():
        folder = root / {"training": "train", "validation": "valid"}[split]
        annotations = []
        for i, scene in enumerate(part):
            save(folder / f"{scene.name}.png", scene.photo)
            for k in np.unique(scene.classes):
                lengths = {"size": list(SIZE), "counts": run_lengths(scene.classes == k)}
                subject = {"image_id": 7 * i, "category_id": IDS[k], "segmentation": lengths}
                annotations.append(subject | {"id": len(annotations)})
        content = header(part) | {"annotations": annotations}
        write_json(folder / "_annotations.coco.json", content)
    return [str(root), "--unlabelled", "ignore"]


def boxes(scene: Scene) -> list[tuple[int, list[float]]]:
    """Class and corners of a rectangle of each class of a scene."""
    corners_of_classes = []
    for k in np.unique(scene.classes).tolist():
        rows, columns = np.nonzero(scene.classes == k)
        top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
        corners = [left, top, right, top, right, bottom, left, bottom]
        corners_of_classes.append((k, [float(x) for x in corners]))
    return corners_of_classes


def write_yolo(root: Path, splits: dict[str, list[Scene]]) -> list[str]:
    """YOLO's text files of polygons in shares of the sides; data.yaml says `../train`, as Roboflow does."""
    for split, part in splits.items():
        folder = root / {"training": "train", "validation": "valid"}[split]
        for scene in part:
            save(folder / f"images/{scene.name}.png", scene.photo)
            lines = []
            for k, corners in boxes(scene):
                shares = np.reshape(corners, (-1, 2)) / SIZE[::-1]
                lines.append(" ".join(map(str, [k, *shares.ravel().tolist()])))
            (folder / "labels").mkdir(exist_ok=True)
            (folder / f"labels/{scene.name}.txt").write_text("\n".join(lines))
    content = {"names": CLASSES, "train": "../train/images", "val": "../valid/images"}
    write_json(root / "data.yaml", content)  # JSON is YAML
    return [str(root), "--unlabelled", "ignore"]


def write_labelme(root: Path, splits: dict[str, list[Scene]]) -> list[str]:
    """LabelMe's JSON, one for each photo, with polygons, and the last class as a mask."""
    words = []
    for split, part in splits.items():
        for scene in part:
            save(root / split / f"{scene.name}.png", scene.photo)
            shapes = []
            for k, corners in boxes(scene):
                points = np.reshape(corners, (-1, 2)).tolist()
                shapes.append({"label": CLASSES[k], "points": points, "shape_type": "polygon"})
            content = {
                "shapes": shapes,
                "imagePath": f"..\\{split}\\{scene.name}.png",
                "imageHeight": SIZE[0],
                "imageWidth": SIZE[1],
            }
            write_json(root / split / f"{scene.name}.json", content)
        words.append(f"{split}={root / split}")
    return [*words, "--unlabelled", "ignore"]


def as_shape_mask(mask: np.ndarray) -> dict:
    """LabelMe's shape of a mask: a PNG of the part inside its box."""
    content = io.BytesIO()
    rows, columns = np.nonzero(mask)
    top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
    Image.fromarray(mask[top : bottom + 1, left : right + 1]).save(content, "PNG")
    points = [[float(left), float(top)], [float(right), float(bottom)]]
    encoded = base64.b64encode(content.getvalue()).decode()
    return {"shape_type": "mask", "points": points, "mask": encoded}
