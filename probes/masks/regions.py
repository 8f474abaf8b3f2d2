"""Sources of objects that may overlap: COCO, LabelMe and YOLO. pycocotools makes pixels of polygons and run lengths.

Rasterisers differ by a pixel along borders; pycocotools is the one that COCO's scores are made with.
"""

import base64
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy import ndarray
from PIL import Image

from llava_bidir.common.errors import UserError, error_context
from llava_bidir.common.files import read_json
from probes.config import MasksOptions

from .source import (
    SPLIT_NAMES,
    AnnotatedPhoto,
    ImageFolder,
    LabelMap,
    MaskSource,
    Region,
    Size,
    check_ids,
    parts_inside,
    photo_name,
)

LABELME_SUBJECTS = ("polygon", "rectangle", "circle", "mask")
Json = dict[str, Any]


def read_coco(
    path: Path,
    options: MasksOptions,
    read: Callable[..., list[Region] | LabelMap],
    leaves_pixels_unlabelled: bool = True,
) -> MaskSource:
    """Return instances or stuff in COCO's JSON, or in a folder with one such file, as Roboflow writes it.

    Args:
        path: The file or folder.
        options: Of the command.
        read: Returns what is annotated on a photo, of the file, its classes by id, annotations and the size.
        leaves_pixels_unlabelled: Of the source.
    """
    if path.is_dir():
        files = sorted(path.glob("*.json"))
        if len(files) != 1:
            raise UserError(f"{path} has {len(files)} JSON files; name the one of COCO")
        path = files[0]
    images = ImageFolder(options.images or path.parent)
    content = read_json(path)
    with error_context(path):
        classes = {category["id"]: category["name"] for category in content["categories"]}
        annotations: dict[int, list[Json]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            for subject in annotation.get("segments_info", [annotation]):  # of panoptic files
                if subject["category_id"] not in classes:
                    raise UserError(
                        f"annotation {subject.get('id')} has category_id {subject['category_id']}, which the file "
                        "does not define"
                    )
            annotations[annotation["image_id"]].append(annotation)
        photos = [
            AnnotatedPhoto(
                photo_name(image["file_name"]),
                images.find(image["file_name"]),
                partial(read, path, classes, annotations[image["id"]]),
                size=(image["width"], image["height"]),
            )
            for image in content["images"]
        ]
        return MaskSource(check_ids(classes), [path], photos, leaves_pixels_unlabelled)


def read_objects(
    file: Path, classes: dict[int, str], annotations: list[Json], size: Size
) -> list[Region]:
    """Return the regions of a photo's annotations in COCO's JSON."""

    def draw(annotation: Json, size: Size) -> Region:
        mask = decode(annotation["segmentation"], size)
        is_crowd = bool(annotation.get("iscrowd"))
        return Region(classes[annotation["category_id"]], mask, is_crowd)

    subjects = [(f"annotation {x.get('id')}", x) for x in annotations]
    return draw_regions(file, subjects, draw, size)


def draw_regions(
    file: Path, subjects: list[tuple[str, Any]], draw: Callable[[Any, Size], Region], size: Size
) -> list[Region]:
    """Return what a function draws of each subject; errors name the file and the subject."""
    regions = []
    for name, subject in subjects:
        with error_context(f"{file}, {name}"):
            regions.append(draw(subject, size))
    return regions


def read_labelme(path: Path, options: MasksOptions) -> MaskSource:
    """Return a folder of LabelMe's JSON, one file for each photo; labels are ordered by name."""
    images = ImageFolder(options.images or path)
    source = MaskSource(names=[], files=sorted(path.rglob("*.json")))
    for file in source.files:
        content = read_json(file)
        with error_context(file):
            shapes = content["shapes"]
            source.names += [shape["label"] for shape in shapes]
            *_, name = parts_inside(content["imagePath"])
            image = file.parent / name
            if options.images or not image.is_file():
                image = images.find(name)
            subjects = [(f"shape {i} {shape['label']!r}", shape) for i, shape in enumerate(shapes)]
            photo = AnnotatedPhoto(
                photo_name(file.relative_to(path)),
                image,
                partial(draw_regions, file, subjects, _draw_shape),
                size=(content["imageWidth"], content["imageHeight"]),
            )
            source.photos.append(photo)
    source.names = sorted({*source.names})
    return source


def _draw_shape(shape: Json, size: Size) -> Region:
    return Region(shape["label"], _pixels_of_shape(shape, size))


def _pixels_of_shape(shape: Json, size: Size) -> ndarray:
    """Return the pixels of one of LabelMe's shapes, bool[H, W]."""
    kind = shape.get("shape_type") or "polygon"
    if kind not in LABELME_SUBJECTS:
        raise UserError(
            f"is a {kind}, which has no area; expected {', '.join(LABELME_SUBJECTS)}: remove it, or draw its outline"
        )
    if kind == "polygon":
        return decode([np.ravel(shape["points"]).tolist()], size)
    (left, top), (right, bottom) = shape["points"]
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
    mask[int(top) : int(top) + rows, int(left) : int(left) + columns] = part
    return mask


def read_yolo(path: Path, options: MasksOptions) -> MaskSource:
    """Return YOLO's segmentation: data.yaml, and a text file for each image with lines `class x y x y ...`.

    Corners are in shares of a side.
    """
    config = path
    if path.is_dir():
        config = path / "data.yaml"
    with error_context(config):
        content = yaml.safe_load(config.read_text())
        names = content["names"]
        if isinstance(names, list):
            names = dict(enumerate(names))
        names = {int(number): name for number, name in names.items()}
        source = MaskSource(check_ids(names), [config])
    for key in sorted(content.keys() & SPLIT_NAMES.keys()):
        folders = content[key] or []
        if isinstance(folders, str):
            folders = [folders]
        for folder in folders:
            images = _folder_of_yolo(config.parent / content.get("path", ""), folder)
            for image in ImageFolder(images).files:
                file = _labels_of(image)
                lines = []
                if file.is_file():  # a photo without objects may have none
                    source.files.append(file)
                    lines = file.read_text().splitlines()
                subjects = [(f"line {i}", line) for i, line in enumerate(lines, 1) if line.strip()]
                photo = AnnotatedPhoto(
                    photo_name(image.relative_to(images)),
                    image,
                    partial(draw_regions, file, subjects, partial(_draw_line, names)),
                    split=SPLIT_NAMES[key],
                )
                source.photos.append(photo)
    return source


def _draw_line(names: dict[int, str], line: str, size: Size) -> Region:
    category, *shares = map(float, line.split())
    if category not in names:
        raise UserError(f"class {category:g} is not in data.yaml")
    corners = np.array(shares)
    corners[::2] *= size[0]
    corners[1::2] *= size[1]
    return Region(names[category], decode([corners.tolist()], size))


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


def decode(segmentation: list | Json, size: Size) -> ndarray:
    """Return the pixels of a segmentation as COCO has it, bool[H, W], as pycocotools' annToMask does.

    Args:
        segmentation: Polygons [[x, y, x, y, ...], ...], or run lengths {"counts", "size"}, compressed or a list.
        size: Width and height.

    Raises:
        UserError: pycocotools is not installed, a polygon has fewer than three corners or a corner nowhere, or run
            lengths are of another size: pycocotools takes four numbers for a box, and the rest for what it finds.
    """
    try:
        from pycocotools import mask as coco
    except ImportError:
        raise UserError(
            "polygons and run lengths need pycocotools; install it: pip install 'llava-bidir[coco]'"
        ) from None
    width, height = size
    if isinstance(segmentation, list):
        if not segmentation:
            raise UserError("has no polygon; a box alone says nothing of pixels")
        for corners in segmentation:
            if len(corners) < 6 or len(corners) % 2 or not np.isfinite(corners).all():
                raise UserError(
                    f"a polygon is {corners}; expected finite x and y of three corners or more"
                )
        lengths = coco.merge(coco.frPyObjects(segmentation, height, width))
    else:
        lengths = segmentation
        if isinstance(counts := lengths["counts"], list):
            if sum(counts) != height * width or min(counts) < 0:
                raise UserError(f"run lengths count {sum(counts)} of {height * width} pixels")
            lengths = coco.frPyObjects(lengths, height, width)
        if lengths["size"] != [height, width]:
            raise UserError(
                f"run lengths are of size {lengths['size']}, expected {[height, width]}"
            )
    return coco.decode(lengths) > 0
