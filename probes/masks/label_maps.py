"""Sources with one label for each pixel: colour and palette PNG, COCO's panoptic PNG, ADE20K in full, data sets."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy import ndarray

from llava_bidir.common.errors import UserError, error_context
from llava_bidir.common.files import read_json
from llava_bidir.common.images import read_image
from probes.config import MasksOptions
from probes.data.image_dataset import EmbeddedFile

from .source import IGNORED, UNLABELLED, MaskSource, Photo, photo_name, split_of

FOLDERS = (("JPEGImages", "SegmentationClass"), ("images", "annotations"), ("images", "masks"))
MOST_ID = 65_535  # of 16-bit PNG
LOSSY = (".jpg", ".jpeg")


def read_colours(file: Path) -> ndarray:
    """Return the colours of a mask as numbers R + 256 G + 65536 B, i32[H, W].

    Raises:
        UserError: It is no PNG of 8 bits; compression as of JPEG makes new colours.
    """
    image = read_image(file, lambda image: image.copy(), ("PNG",))
    if image.mode not in ("RGB", "RGBA", "P", "L"):
        raise UserError(f"{file} has mode {image.mode!r}; expected colours of 8 bits")
    colours = np.asarray(image.convert("RGB"), np.int32)  # uint8 would overflow
    return colours @ np.int32([1, 256, 65_536])


def number_colours(colours: ndarray, numbers: dict[int, int], missing: int) -> ndarray:
    """Return the number of each pixel's colour, i32[H, W], `missing` where it has none."""
    ids = np.array(sorted(numbers), np.int32)
    places = np.searchsorted(ids, colours).clip(max=len(ids) - 1)
    of_ids = np.array([numbers[colour] for colour in ids.tolist()], np.int32)
    return np.where(ids[places] == colours, of_ids[places], missing)


def check_ids(ids: ndarray, classes: dict[int, str], file: Path | EmbeddedFile) -> None:
    """Raise a UserError if pixels have an id that no class has; names their number and one pixel."""
    wrong = ~np.isin(ids, [*classes, UNLABELLED, IGNORED])
    if wrong.any():
        raise_wrong(wrong, file, f"the id {ids[wrong][0]}")


def raise_wrong(wrong: ndarray, file: Path | EmbeddedFile, what: str) -> NoReturn:
    """Raise a UserError about pixels bool[H, W] of a mask, of which the first has `what`."""
    row, column = np.argwhere(wrong)[0]
    raise UserError(
        f"{file}: {wrong.sum():,} pixels are of no class, e.g. {what} in row {row}, column {column}"
    )


class ColourSource(MaskSource):
    """PNG of colours or a palette, with the colours of the classes in labelmap.txt (CVAT, VOC) or classes.json.

    The masks are in FROM, their images in --images; or both are in FROM, in folders as VOC, CVAT or we name them.
    """

    leaves_pixels_unlabelled = False

    def __init__(self, path: str, split: str, options: MasksOptions):
        super().__init__(path, split, options)
        label_map = list(_read_label_map(self.path))
        self.classes = dict(enumerate(name for name, _ in label_map))
        self._number_of = {
            red + 256 * green + 65_536 * blue: number
            for number, (_, (red, green, blue)) in enumerate(label_map)
        }
        if len(self._number_of) < len(label_map):
            raise UserError(f"{self.path}: two classes have one colour")
        masks = self.path
        if not options.images:
            pairs = [pair for pair in FOLDERS if all((self.path / x).is_dir() for x in pair)]
            if not pairs:
                raise UserError(f"{self.path}: --images DIR needs to say where the photos are")
            self.image_folder, masks = (self.path / name for name in pairs[0])
        lossy = [file for file in sorted(masks.rglob("*")) if file.suffix.lower() in LOSSY]
        if lossy:
            raise UserError(
                f"{lossy[0]} is a JPEG, whose compression makes colours that no class has; export masks as PNG"
            )
        self.files = sorted(masks.rglob("*.png"))
        images = {
            photo_name(str(image.relative_to(self.image_folder))): image
            for images in self._images_by_name.values()
            for image in images
        }
        listed = _read_lists(self.path / "ImageSets/Segmentation")
        self.photos = []
        for mask in self.files:
            path = str(mask.relative_to(masks))
            name = photo_name(path)
            if name not in images:
                raise UserError(f"{mask} has no image in {self.image_folder}")
            named = split or listed.get(mask.stem) or split_of(path)
            self.photos.append(Photo(name, named, images[name], mask))

    def read(self, photo: Photo, size: tuple[int, int]) -> ndarray:
        """Return the class of each pixel's colour."""
        colours = read_colours(photo.annotation)
        ids = number_colours(colours, self._number_of, missing=UNLABELLED)
        if (ids == UNLABELLED).any():
            first = int(colours[ids == UNLABELLED][0])
            red, green, blue = first % 256, first // 256 % 256, first // 65_536
            raise_wrong(ids == UNLABELLED, photo.annotation, f"the colour {red},{green},{blue}")
        return ids


def _read_label_map(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """Yield names and colours of classes, from lines `name:r,g,b:parts:actions`, or a palette."""
    file = folder / "labelmap.txt"
    if file.is_file():
        with error_context(file):
            for line in file.read_text().splitlines():
                if line.strip() and not line.startswith("#"):
                    name, colour = line.split(":")[:2]
                    red, green, blue = map(int, colour.split(","))
                    yield name, [red, green, blue]
        return
    file = folder / "classes.json"
    content = read_json(file)
    with error_context(file):
        yield from zip(content["classes"], content["palette"], strict=True)


def _read_lists(folder: Path) -> dict[str, str]:
    """Return the split of each image that a list of VOC names."""
    lists = [(file, split_of(file.stem)) for file in sorted(folder.glob("*.txt"))]
    return {
        Path(line).stem: split
        for file, split in lists
        for line in file.read_text().split()
        if split
    }


class PanopticSource(MaskSource):
    """COCO's panoptic JSON, with its PNG in the folder of the same name, or beside it."""

    leaves_pixels_unlabelled = False  # a segment that is not listed is void, which is ignored

    def __init__(self, path: str, split: str, options: MasksOptions):
        super().__init__(path, split, options)
        folder = self.path.with_suffix("")
        content = read_json(self.path)
        with error_context(self.path):
            self.classes = {entry["id"]: entry["name"] for entry in content["categories"]}
            image_of = {image["id"]: image for image in content["images"]}
            self.photos = []
            self.files = [self.path]
            for annotation in content["annotations"]:
                image = image_of[annotation["image_id"]]
                segments = {x["id"]: x["category_id"] for x in annotation["segments_info"]}
                if not {*segments.values()} <= self.classes.keys():
                    raise UserError(
                        f"{annotation['file_name']}: a segment has a category that the file does not define"
                    )
                self.files.append(folder / annotation["file_name"])
                self.photos.append(
                    Photo(
                        name=photo_name(image["file_name"]),
                        split=split,
                        image=self.find_image(image["file_name"]),
                        annotation=(folder / annotation["file_name"], segments),
                        size=(image["width"], image["height"]),
                    )
                )

    def read(self, photo: Photo, size: tuple[int, int]) -> ndarray:
        """Return the category of each pixel."""
        file, category_of = photo.annotation
        return number_colours(read_colours(file), category_of, missing=IGNORED)


class FullAde20kSource(MaskSource):
    """ADE20K with all its classes: NAME_seg.png beside NAME.jpg; the class is R // 10 * 256 + G, instances are in B.

    NAME.json names the classes of a photo's objects. Source: loadAde20K in utils_ade20k.py of CSAILVision/ADE20K.
    """

    def __init__(self, path: str, split: str, options: MasksOptions):
        super().__init__(path, split, options)
        self.files = sorted(self.path.rglob("*_seg.png"))
        self.classes = {}
        self.photos = []
        for mask in self.files:
            stem = mask.name.removesuffix("_seg.png")
            names = mask.with_name(f"{stem}.json")
            content = read_json(names)
            with error_context(names):
                for subject in content["annotation"]["object"]:
                    self.classes[int(subject["name_ndx"])] = subject["name"]
            image = mask.with_name(f"{stem}.jpg")
            if not image.is_file():
                raise UserError(f"{mask} has no image {image.name}")
            named = split or split_of(str(mask.relative_to(self.path)))
            self.photos.append(Photo(stem, named, image, mask))

    def read(self, photo: Photo, size: tuple[int, int]) -> ndarray:
        """Return the class of each pixel; 0 has none."""
        colours = read_colours(photo.annotation)
        ids = colours % 256 // 10 * 256 + colours // 256 % 256
        ids[ids == 0] = UNLABELLED
        check_ids(ids, self.classes, photo.annotation)
        return ids


class HubSource(MaskSource):
    """A data set of the library `datasets`: a folder that it saved, parquet or arrow files, or a hub id.

    Names of classes come from --classes FILE, id2label.json in the folder, or the only ClassLabel among the columns.
    Without a name, 255 of 8-bit masks and 65535 of 16-bit masks are ignored.
    """

    leaves_pixels_unlabelled = False

    def __init__(self, path: str, split: str, options: MasksOptions):
        super().__init__(path, split, options)
        import datasets

        self.files = [file for file in sorted(self.path.rglob("*")) if file.is_file()]
        loaded = self._load(datasets)
        if isinstance(loaded, datasets.Dataset):
            loaded = {"": loaded}
        elif len(loaded) == 1:  # `train`, which is how the library calls what has no splits
            loaded = {"": next(iter(loaded.values()))}
        self._rows = {}
        self.photos = []
        for name, rows in loaded.items():
            for column in (options.image_column, options.mask_column):
                if column not in rows.column_names:
                    raise UserError(
                        f"{path} has no column {column!r}, but {', '.join(rows.column_names)}; name those of image "
                        "and mask: --image_column, --mask_column"
                    )
            encoded = datasets.Image(decode=False)
            self._rows[name] = rows.cast_column(options.image_column, encoded).cast_column(
                options.mask_column, encoded
            )
            width = len(str(len(rows)))
            self.photos += [
                Photo(f"{i:0{width}}", split or split_of(name), None, (name, i))
                for i in range(len(rows))
            ]
        self.classes = self._read_names(datasets, rows.features)

    def _load(self, datasets: Any) -> Any:
        if self.path.is_dir() and [*self.path.rglob("state.json")]:
            return datasets.load_from_disk(str(self.path))
        kind = self.path.suffix.removeprefix(".")
        if kind in ("parquet", "arrow"):
            return datasets.load_dataset(kind, data_files=str(self.path))
        return datasets.load_dataset(str(self.path))

    def _read_names(self, datasets: Any, features: dict[str, Any]) -> dict[int, str]:
        """Return the names of the classes."""
        folder = self.path if self.path.is_dir() else self.path.parent
        files = [Path(x) for x in self.options.classes if x.endswith(".json")]
        files += [file for file in [folder / "id2label.json"] if file.is_file()]
        if files:
            names = read_json(files[0])
            with error_context(files[0]):
                ids = {int(number): name for number, name in names.items()}
            if not all(0 <= number <= MOST_ID for number in ids):
                raise UserError(
                    f"{files[0]} has the id {max(ids)}; masks have ids of 0 to {MOST_ID}"
                )
            return ids
        flat = [getattr(feature, "feature", feature) for feature in features.values()]
        labels = [feature for feature in flat if isinstance(feature, datasets.ClassLabel)]
        if len(labels) != 1:
            raise UserError(
                f"{self.path} does not name the classes of its masks; --classes FILE, a JSON as "
                '{"0": "wall", "1": "floor"}, does'
            )
        return dict(enumerate(labels[0].names))

    def _encoded(self, photo: Photo, column: str) -> Path | EmbeddedFile:
        split, row = photo.annotation
        content = self._rows[split][row][column]
        if content["bytes"] is None:
            return Path(content["path"])
        return EmbeddedFile(content["bytes"], f"{self.path}, {column} {row} of {split}")

    def image_of(self, photo: Photo) -> Path | EmbeddedFile:
        """Return the file of a photo, or its bytes."""
        return self._encoded(photo, self.options.image_column)

    def read(self, photo: Photo, size: tuple[int, int]) -> ndarray:
        """Return the id of each pixel."""
        file = self._encoded(photo, self.options.mask_column)
        image = read_image(file, lambda image: image.copy(), ("PNG", "TIFF"))
        if image.mode not in ("L", "P", "I;16", "I"):
            raise UserError(f"{file} has mode {image.mode!r}; expected one id for each pixel")
        ids = np.array(image, np.int32)
        void = MOST_ID if image.mode.startswith("I") else 255
        if void not in self.classes:
            ids[ids == void] = IGNORED
        check_ids(ids, self.classes, file)
        return ids
