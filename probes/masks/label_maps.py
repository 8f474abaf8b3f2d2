"""Sources with one label for each pixel: colour and palette PNG, COCO's panoptic PNG, ADE20K in full, data sets."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas
from numpy import ndarray

from llava_bidir.common.errors import UserError, error_context
from llava_bidir.common.files import read_json
from llava_bidir.common.images import read_image
from probes.config import MasksOptions
from probes.data.image_dataset import EmbeddedFile

from .source import (
    IGNORED,
    MOST_ID,
    UNLABELLED,
    AnnotatedPhoto,
    ClassName,
    ImageFolder,
    LabelMap,
    MaskSource,
    Size,
    check_ids,
    photo_name,
    split_of,
)

if TYPE_CHECKING:
    from datasets import Dataset

FOLDERS = (("JPEGImages", "SegmentationClass"), ("images", "annotations"), ("images", "masks"))
LOSSY = (".jpg", ".jpeg")


def read_colours(file: Path) -> ndarray:
    """Return the colours of a mask as numbers R + 256 G + 65536 B, i32[H, W].

    Raises:
        UserError: It is no PNG of 8 bits; compression as of JPEG makes new colours.
    """
    image = read_image(file, lambda image: image.copy(), ("PNG",))
    if image.mode not in ("RGB", "RGBA", "P", "L"):
        raise UserError(f"{file} has mode {image.mode!r}; expected colours of 8 bits")
    colours = np.asarray(image.convert("RGBA")).view("<i4")[..., 0]
    return colours & 0xFFFFFF  # without transparency


def name_pixels(
    values: ndarray,
    name_of: Mapping[int, ClassName],
    file: Path | EmbeddedFile,
    describe: Callable[[int], str] = str,
    unlisted: ClassName | None = None,
) -> LabelMap:
    """Return the class of each pixel by its value.

    Args:
        values: i32[H, W], colours or ids.
        name_of: Class of each value.
        file: Of the values.
        describe: Returns a value in the file's own terms.
        unlisted: Class of other values; None if there may be none.

    Raises:
        UserError: Pixels have another value; names how many, and one pixel.
    """
    numbers, different = pandas.factorize(values.ravel())
    names = [name_of.get(value, unlisted) for value in different.tolist()]
    if None in names:
        is_wrong = np.array([name is None for name in names])[numbers]
        row, column = divmod(int(is_wrong.argmax()), values.shape[1])
        raise UserError(
            f"{file}: {is_wrong.sum():,} pixels are of no class, e.g. {describe(values[row, column])} in row {row}, "
            f"column {column}"
        )
    return LabelMap(numbers.reshape(values.shape), names)


def read_colour_masks(path: Path, options: MasksOptions) -> MaskSource:
    """Return PNG of colours or a palette, with the colours of the classes in labelmap.txt or classes.json.

    The masks are in FROM, their images in --images; or both are in FROM, in folders as VOC, CVAT or we name them.
    """
    label_map = list(_read_label_map(path))
    name_of = {red + 256 * green + 65_536 * blue: name for name, (red, green, blue) in label_map}
    if len(name_of) < len(label_map):
        raise UserError(f"{path}: two classes have one colour")
    masks = path
    images = options.images
    if not images:
        pairs = [pair for pair in FOLDERS if all((path / name).is_dir() for name in pair)]
        if not pairs:
            raise UserError(f"{path}: --images DIR needs to say where the photos are")
        images, masks = (path / name for name in pairs[0])
    image_of = _images_by_name(images)
    listed = _read_lists(path / "ImageSets/Segmentation")
    source = MaskSource(list(name_of.values()), ImageFolder(masks).files)
    source.leaves_pixels_unlabelled = False
    source.colour_of = dict(label_map)
    for mask in source.files:
        if mask.suffix.lower() in LOSSY:
            raise UserError(
                f"{mask} is a JPEG, whose compression makes colours that no class has; export masks as PNG"
            )
        inside = mask.relative_to(masks)
        name = photo_name(inside)
        if name not in image_of:
            raise UserError(f"{mask} has no image in {images}")
        read = partial(_read_colour_mask, mask, name_of)
        split = listed.get(mask.stem) or split_of(inside)
        source.photos.append(AnnotatedPhoto(name, image_of[name], read, split=split))
    if len(image_of) > len(source.files):
        print(f"{len(image_of) - len(source.files):,} photos without a mask are left out")
    return source


def _read_label_map(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """Yield names and colours of classes, from lines `name:r,g,b:parts:actions`, or a palette."""
    file = folder / "labelmap.txt"
    if not file.is_file():
        file = folder / "classes.json"
        content = read_json(file)
        with error_context(file):
            yield from zip(content["classes"], content["palette"], strict=True)
        return
    with error_context(file):
        for line in file.read_text().splitlines():
            if line.strip() and not line.startswith("#"):
                name, colour = line.split(":")[:2]
                red, green, blue = map(int, colour.split(","))
                yield name, [red, green, blue]


def _images_by_name(folder: Path) -> dict[str, Path]:
    """Return images by the name of their photo."""
    images: dict[str, Path] = {}
    for image in ImageFolder(folder).files:
        name = photo_name(image.relative_to(folder))
        if name in images:
            raise UserError(f"{images[name]} and {image} are two images of one name; remove one")
        images[name] = image
    return images


def _read_lists(folder: Path) -> dict[str, str]:
    """Return the split of each image that a list of VOC names."""
    splits = {}
    for file in sorted(folder.glob("*.txt")):
        if split := split_of(file.stem):
            splits |= dict.fromkeys([Path(x).stem for x in file.read_text().split()], split)
    return splits


def _read_colour_mask(mask: Path, name_of: dict[int, ClassName], _: Size) -> LabelMap:
    return name_pixels(read_colours(mask), name_of, file=mask, describe=describe_colour)


def describe_colour(number: int) -> str:
    """Return red, green and blue of a colour from :func:`read_colours`."""
    return f"{number % 256},{number // 256 % 256},{number // 65_536}"


def read_panoptic(
    file: Path, classes: dict[int, str], annotations: list[dict[str, Any]], _: Size
) -> LabelMap:
    """Return the classes of COCO's panoptic PNG, in the folder of the JSON's name; what is not listed is ignored."""
    [annotation] = annotations
    mask = file.with_suffix("") / annotation["file_name"]
    name_of = {x["id"]: classes[x["category_id"]] for x in annotation["segments_info"]}
    return name_pixels(read_colours(mask), name_of, file=mask, unlisted=IGNORED)


def read_full_ade20k(path: Path, options: MasksOptions) -> MaskSource:
    """Return ADE20K with all its classes: NAME_seg.png beside NAME.jpg; the class is R // 10 * 256 + G.

    NAME.json names the classes of a photo's objects. Source: loadAde20K in utils_ade20k.py of CSAILVision/ADE20K.
    """
    name_of: dict[int, ClassName] = {}
    files = sorted(path.rglob("*_seg.png"))
    photos = []
    for mask in files:
        stem = mask.name.removesuffix("_seg.png")
        names = mask.with_name(f"{stem}.json")
        content = read_json(names)
        with error_context(names):
            for subject in content["annotation"]["object"]:
                name_of[int(subject["name_ndx"])] = subject["name"]
        image = mask.with_name(f"{stem}.jpg")
        if not image.is_file():
            raise UserError(f"{mask} has no image {image.name}")
        read = partial(_read_ade20k_mask, mask, name_of)
        split = split_of(mask.relative_to(path))
        photos.append(AnnotatedPhoto(stem, image, read, split=split))
    names_of_classes = check_ids(name_of)
    name_of[0] = UNLABELLED
    return MaskSource(names_of_classes, files, photos)


def _read_ade20k_mask(mask: Path, name_of: dict[int, ClassName], _: Size) -> LabelMap:
    colours = read_colours(mask)
    return name_pixels(colours % 256 // 10 * 256 + colours // 256 % 256, name_of, mask)


def read_data_set(path: Path, options: MasksOptions) -> MaskSource:
    """Return a data set of the library `datasets`: a folder that it saved, parquet or arrow files, or a hub id.

    Names of classes come from --classes FILE, id2label.json in the folder, or the only ClassLabel among the columns.
    Without a name, 255 of 8-bit masks and 65535 of 16-bit masks are ignored.
    """
    import datasets

    kind = path.suffix.removeprefix(".")
    if path.is_dir() and any(path.rglob("state.json")):
        loaded = datasets.load_from_disk(str(path))
    elif kind in ("parquet", "arrow"):
        loaded = datasets.load_dataset(kind, data_files=str(path))
    else:
        loaded = datasets.load_dataset(str(path))
    if isinstance(loaded, datasets.Dataset):
        loaded = {"train": loaded}
    columns = [options.image_column, options.mask_column]
    photos = []
    for name, rows in loaded.items():
        name_of = _names_of_ids(path, options.classes, features=rows.features)
        with error_context(f"{path}: --image_column, --mask_column"):
            rows = rows.select_columns(columns)
        for column in columns:
            rows = rows.cast_column(column, datasets.Image(decode=False))
        split = split_of(name)
        if len(loaded) == 1:  # `train` is how the library calls what has no splits
            split = ""
        width = len(str(len(rows)))
        for i in range(len(rows)):
            image, mask = (partial(_cell, rows, i, column) for column in columns)
            read = partial(_read_ids, mask, name_of)
            photos.append(AnnotatedPhoto(f"{i:0{width}}", image, read, split=split))
    files = [file for file in [path, *sorted(path.rglob("*"))] if file.is_file()]
    return MaskSource(check_ids(name_of), files, photos, leaves_pixels_unlabelled=False)


def _names_of_ids(
    path: Path, words: tuple[str, ...], features: Mapping[str, Any]
) -> dict[int, ClassName]:
    """Return the names of a data set's classes by id."""
    from datasets import ClassLabel

    folder = path
    if not path.is_dir():
        folder = path.parent
    files = [Path(word) for word in words if word.endswith(".json")]
    files += [*folder.glob("id2label.json")]
    if files:
        names = read_json(files[0])
        with error_context(files[0]):
            name_of = {int(number): name for number, name in names.items()}
            check_ids(name_of)
        return name_of
    flat = [getattr(feature, "feature", feature) for feature in features.values()]
    labels = [feature for feature in flat if isinstance(feature, ClassLabel)]
    if len(labels) != 1:
        raise UserError(
            f"{path} does not name the classes of its masks; --classes FILE, a JSON as "
            '{"0": "wall", "1": "floor"}, does'
        )
    return dict(enumerate(labels[0].names))


def _cell(rows: "Dataset", row: int, column: str) -> Path | EmbeddedFile:
    """Return an image in a data set: a file, or its bytes."""
    content = rows[row][column]
    if content["bytes"] is None:
        return Path(content["path"])
    return EmbeddedFile(content["bytes"], f"{column} {row} of {rows.split or 'the data set'}")


def _read_ids(
    cell: Callable[[], Path | EmbeddedFile], name_of: dict[int, ClassName], _: Size
) -> LabelMap:
    file = cell()
    image = read_image(file, lambda image: image.copy(), ("PNG", "TIFF"))
    if image.mode not in ("L", "P", "I;16", "I"):
        raise UserError(f"{file} has mode {image.mode!r}; expected one id for each pixel")
    void = 255
    if image.mode.startswith("I"):
        void = MOST_ID
    return name_pixels(np.array(image, np.int32), {void: IGNORED} | name_of, file)
