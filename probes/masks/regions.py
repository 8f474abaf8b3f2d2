"""Sources of objects that may overlap: COCO, LabelMe and YOLO. pycocotools makes pixels of polygons and run lengths.

Rasterisers differ by a pixel along borders; pycocotools is the one that COCO's scores are made with.
"""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy import ndarray
from PIL import Image

from llava_bidir.common.errors import UserError, error_context
from llava_bidir.common.files import read_json
from llava_bidir.common.images import SUFFIXES
from probes.config import MasksOptions

from .source import SPLIT_NAMES, AnnotatedPhoto, MaskSource, Region, parts_inside, photo_name

FEWEST_NUMBERS = 6  # x and y of three corners
LABELME_SUBJECTS = ("polygon", "rectangle", "circle", "mask")


def decode(segmentation: list | dict, size: tuple[int, int]) -> ndarray:
    """Return the pixels of a segmentation as COCO has it, bool[H, W], as pycocotools' annToMask does.

    Args:
        segmentation: Polygons [[x, y, x, y, ...], ...], or run lengths {"counts", "size"}, compressed or a list.
        size: Width and height.

    Raises:
        UserError: pycocotools is not installed, a polygon has fewer than three corners or a corner nowhere, or run
            lengths are of another size.
    """
    width, height = size
    if isinstance(segmentation, list):
        if not segmentation:
            raise UserError("has no polygon; a box alone says nothing of pixels")
        for polygon in segmentation:
            check_polygon(polygon)
    else:
        check_run_lengths(segmentation, size)
    try:
        from pycocotools import mask as coco
    except ImportError:
        raise UserError(
            "polygons and run lengths need pycocotools; install it: pip install 'llava-bidir[coco]'"
        ) from None
    if isinstance(segmentation, list):
        segmentation = coco.merge(coco.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = coco.frPyObjects(segmentation, height, width)
    return coco.decode(segmentation).astype(bool)


def check_run_lengths(lengths: dict[str, Any], size: tuple[int, int]) -> None:
    """Raise a UserError unless run lengths are of an image of this width and height."""
    width, height = size
    if list(lengths["size"]) != [height, width]:
        raise UserError(f"run lengths are of size {lengths['size']}, expected {[height, width]}")
    counts = lengths["counts"]
    if isinstance(counts, list) and (sum(counts) != height * width or min(counts) < 0):
        raise UserError(f"run lengths count {sum(counts)} of {height * width} pixels")


def check_polygon(numbers: Sequence[float]) -> None:
    """Raise a UserError unless a polygon is x and y of three corners or more, all of them numbers.

    pycocotools takes four numbers for a box.
    """
    if len(numbers) < FEWEST_NUMBERS or len(numbers) % 2:
        raise UserError(
            f"a polygon has {len(numbers)} numbers; expected x and y of three corners or more"
        )
    if not np.isfinite(np.asarray(numbers, float)).all():
        raise UserError(f"a polygon has coordinates that are not finite: {numbers}")


class CocoSource(MaskSource):
    """Instances or stuff in COCO's JSON, or a folder with one such file, as Roboflow writes it."""

    def __init__(self, path: str, split: str, options: MasksOptions):
        super().__init__(path, split, options)
        if self.path.is_dir():
            files = sorted(self.path.glob("*.json"))
            if len(files) != 1:
                raise UserError(f"{self.path} has {len(files)} JSON files; name the one of COCO")
            self.path = files[0]
        self.files = [self.path]
        content = read_json(self.path)
        with error_context(self.path):
            self.classes = {entry["id"]: entry["name"] for entry in content["categories"]}
            annotations: dict[int, list[dict]] = {image["id"]: [] for image in content["images"]}
            for annotation in content["annotations"]:
                for subject in annotation.get("segments_info", [annotation]):  # of panoptic files
                    if subject["category_id"] not in self.classes:
                        raise UserError(
                            f"annotation {subject.get('id')} has category_id {subject['category_id']}, which the file "
                            "does not define"
                        )
                annotations[annotation["image_id"]].append(annotation)
            for image in content["images"]:
                photo = AnnotatedPhoto(
                    name=photo_name(image["file_name"]),
                    split=split,
                    image=self.find_image(image["file_name"]),
                    annotation=annotations[image["id"]],
                    size=(image["width"], image["height"]),
                )
                self.photos.append(photo)

    def read(self, photo: AnnotatedPhoto, size: tuple[int, int]) -> list[Region]:
        """Return the regions of a photo's annotations."""
        regions = []
        for annotation in photo.annotation:
            with error_context(f"{self.path}, annotation {annotation.get('id')}"):
                mask = decode(annotation["segmentation"], size)
            is_crowd = bool(annotation.get("iscrowd"))
            regions.append(Region(annotation["category_id"], mask, is_crowd))
        return regions


class LabelMeSource(MaskSource):
    """A folder of LabelMe's JSON, one file for each photo; labels are ordered by name."""

    def __init__(self, path: str, split: str, options: MasksOptions):
        super().__init__(path, split, options)
        self.files = sorted(self.path.rglob("*.json"))
        names = set()
        for file in self.files:
            content = read_json(file)
            with error_context(file):
                shapes = content["shapes"]
                names |= {shape["label"] for shape in shapes}
                *_, image = parts_inside(content["imagePath"])
                beside = file.parent / image
                if options.images or not beside.is_file():
                    beside = self.find_image(image)
                self.photos.append(
                    AnnotatedPhoto(
                        name=photo_name(str(file.relative_to(self.path))),
                        split=split,
                        image=beside,
                        annotation=(file, shapes),
                        size=(content["imageWidth"], content["imageHeight"]),
                    )
                )
        self.classes = dict(enumerate(sorted(names)))
        self._id_of = {name: number for number, name in self.classes.items()}

    def read(self, photo: AnnotatedPhoto, size: tuple[int, int]) -> list[Region]:
        """Return the regions of a photo's shapes."""
        file, shapes = photo.annotation
        regions = []
        for number, shape in enumerate(shapes):
            with error_context(f"{file}, shape {number} {shape['label']!r}"):
                mask = _pixels_of_shape(shape, size)
                regions.append(Region(self._id_of[shape["label"]], mask))
        return regions


def _pixels_of_shape(shape: dict[str, Any], size: tuple[int, int]) -> ndarray:
    """Return the pixels of one of LabelMe's shapes, bool[H, W]."""
    kind = shape.get("shape_type") or "polygon"
    if kind not in LABELME_SUBJECTS:
        raise UserError(
            f"is a {kind}, which has no area; expected {', '.join(LABELME_SUBJECTS)}: remove it, or draw its outline"
        )
    points = np.asarray(shape["points"], float)
    if kind == "polygon":
        return decode([points.ravel().tolist()], size)
    (left, top), (right, bottom) = points
    if kind == "rectangle":
        return decode([[left, top, right, top, right, bottom, left, bottom]], size)
    width, height = size
    if kind == "circle":  # the centre, and a point on it
        radius = np.hypot(right - left, bottom - top)
        rows, columns = np.ogrid[:height, :width]
        return np.hypot(columns + 0.5 - left, rows + 0.5 - top) <= radius
    content = io.BytesIO(base64.b64decode(shape["mask"], validate=True))
    with Image.open(content, formats=("PNG",)) as image:
        part = np.asarray(image.convert("L")) > 0
    mask = np.zeros((height, width), bool)
    rows, columns = part.shape
    box = mask[int(top) : int(top) + rows, int(left) : int(left) + columns]
    box[...] = part
    return mask


class YoloSource(MaskSource):
    """YOLO's segmentation: data.yaml, and a text file for each image, lines `class x y x y ...` in shares of a side."""

    def __init__(self, path: str, split: str, options: MasksOptions):
        super().__init__(path, split, options)
        config = self.path / "data.yaml" if self.path.is_dir() else self.path
        with error_context(config):
            content = yaml.safe_load(config.read_text())
            names = content["names"]
            pairs = names.items() if isinstance(names, dict) else enumerate(names)
            self.classes = {int(number): name for number, name in pairs}
        self.files = [config]
        for key in sorted(content.keys() & SPLIT_NAMES.keys()):
            folders = content[key] or []
            for folder in [folders] if isinstance(folders, str) else folders:
                images = _folder_of_yolo(config.parent / content.get("path", ""), folder)
                for image in sorted(images.rglob("*")):
                    if image.suffix.lower() in SUFFIXES:
                        labels = _labels_of(image)
                        self.files += [labels] * labels.is_file()
                        name = photo_name(str(image.relative_to(images)))
                        self.photos.append(
                            AnnotatedPhoto(
                                name=name,
                                split=split or SPLIT_NAMES[key],
                                image=image,
                                annotation=labels,
                            )
                        )

    def read(self, photo: AnnotatedPhoto, size: tuple[int, int]) -> list[Region]:
        """Return the regions of the lines; a photo without a file of labels has none."""
        labels: Path = photo.annotation
        lines = labels.read_text().splitlines() if labels.is_file() else []
        regions = []
        for number, line in enumerate(lines, 1):
            with error_context(f"{labels}, line {number}"):
                category, *shares = line.split() or [None]
                if category is None:
                    continue
                if int(category) not in self.classes:
                    raise UserError(f"class {category} is not in data.yaml")
                corners = np.asarray(shares, float)
                check_polygon(corners)
                corners = corners.reshape(-1, 2) * size
                mask = decode([corners.ravel().tolist()], size)
                regions.append(Region(int(category), mask))
        return regions


def _folder_of_yolo(root: Path, folder: str) -> Path:
    """Return a folder of images as data.yaml says it, which in Roboflow's exports is beside it, not above."""
    for path in (root / folder, root / folder.removeprefix("../")):
        if path.is_dir():
            return path
    raise UserError(f"there is no folder {root / folder}, which data.yaml names")


def _labels_of(image: Path) -> Path:
    """Return the text file of an image: in .../labels/..., where the image is in .../images/..."""
    before, images, after = str(image.with_suffix(".txt")).rpartition("/images/")
    return Path(f"{before}/labels/{after}") if images else Path(after)
