"""Sources with one label for each pixel: colour and palette PNG, COCO's panoptic PNG, ADE20K in full, data sets."""

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from llava_bidir.common.errors import UserError, error_context
from llava_bidir.common.files import read_json
from llava_bidir.common.images import read_image
from probes.config import MasksOptions
from probes.data.image_dataset import EmbeddedFile

from .regions import CocoSource
from .source import IGNORED, MOST_ID, UNLABELLED, AnnotatedPhoto, MaskSource, photo_name, split_of

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


def number_values(
    values: ndarray,
    number_of: dict[int, int],
    file: Path | EmbeddedFile,
    describe: Callable[[int], str] = str,
) -> ndarray:
    """Return the number of each pixel's value, i32[H, W].

    Args:
        values: i32[H, W], colours or ids.
        number_of: Number of each value, e.g. IGNORED.
        file: Of the values.
        describe: Returns a value in the file's own terms.

    Raises:
        UserError: Pixels have another value; names how many, and one pixel.
    """
    flat = values.ravel()
    # runs of equal values are few
    starts = np.append(0, np.flatnonzero(flat[1:] != flat[:-1]) + 1)
    pixels = np.diff(starts, append=flat.size)
    run_values = flat[starts]
    expected = np.array(sorted(number_of), np.int32)
    places = np.searchsorted(expected, run_values).clip(max=len(expected) - 1)
    is_wrong = expected[places] != run_values
    if is_wrong.any():
        first = starts[is_wrong][0]
        row, column = divmod(int(first), values.shape[1])
        raise UserError(
            f"{file}: {pixels[is_wrong].sum():,} pixels are of no class, e.g. {describe(flat[first])} in row {row}, "
            f"column {column}"
        )
    numbers = np.array([number_of[value] for value in expected.tolist()], np.int32)[places]
    return numbers.repeat(pixels).reshape(values.shape)


def describe_colour(number: int) -> str:
    """Return red, green and blue of a colour from :func:`read_colours`."""
    return f"{number % 256},{number // 256 % 256},{number // 65_536}"


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
        images = self._images_without_split()
        listed = _read_lists(self.path / "ImageSets/Segmentation")
        for mask in self.files:
            path = str(mask.relative_to(masks))
            name = photo_name(path)
            if name not in images:
                raise UserError(f"{mask} has no image in {self.image_folder}")
            named = split or listed.get(mask.stem) or split_of(path)
            self.photos.append(
                AnnotatedPhoto(name=name, split=named, image=images[name], annotation=mask)
            )
        if len(images) > len(self.files):
            print(f"{len(images) - len(self.files):,} photos without a mask are left out")

    def _images_without_split(self) -> dict[str, Path]:
        """Return the images by the name of their files."""
        images: dict[str, Path] = {}
        for image in chain.from_iterable(self._images_by_name.values()):
            name = photo_name(str(image.relative_to(self.image_folder)))
            if name in images:
                raise UserError(
                    f"{images[name]} and {image} are two images of one name; remove one"
                )
            images[name] = image
        return images

    def read(self, photo: AnnotatedPhoto, size: tuple[int, int]) -> ndarray:
        """Return the class of each pixel's colour."""
        colours = read_colours(photo.annotation)
        return number_values(
            colours, self._number_of, file=photo.annotation, describe=describe_colour
        )


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


class PanopticSource(CocoSource):
    """COCO's panoptic JSON, with its PNG in the folder of the same name; segments that are not listed are ignored."""

    leaves_pixels_unlabelled = False

    def read(self, photo: AnnotatedPhoto, size: tuple[int, int]) -> ndarray:
        """Return the category of each pixel."""
        [annotation] = photo.annotation
        file = self.path.with_suffix("") / annotation["file_name"]
        segments = read_colours(file)
        category_of = dict.fromkeys(np.unique(segments).tolist(), IGNORED)
        for segment in annotation["segments_info"]:
            category_of[segment["id"]] = segment["category_id"]
        return number_values(segments, category_of, file)


class FullAde20kSource(MaskSource):
    """ADE20K with all its classes: NAME_seg.png beside NAME.jpg; the class is R // 10 * 256 + G, instances are in B.

    NAME.json names the classes of a photo's objects. Source: loadAde20K in utils_ade20k.py of CSAILVision/ADE20K.
    """

    def __init__(self, path: str, split: str, options: MasksOptions):
        super().__init__(path, split, options)
        self.files = sorted(self.path.rglob("*_seg.png"))
        self.classes = {}
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
            self.photos.append(AnnotatedPhoto(name=stem, split=named, image=image, annotation=mask))

    def read(self, photo: AnnotatedPhoto, size: tuple[int, int]) -> ndarray:
        """Return the class of each pixel; 0 has none."""
        colours = read_colours(photo.annotation)
        ids = colours % 256 // 10 * 256 + colours // 256 % 256
        return number_values(
            ids, {id_: id_ for id_ in self.classes} | {0: UNLABELLED}, photo.annotation
        )


class HubSource(MaskSource):
    """A data set of the library `datasets`: a folder that it saved, parquet or arrow files, or a hub id.

    Names of classes come from --classes FILE, id2label.json in the folder, or the only ClassLabel among the columns.
    Without a name, 255 of 8-bit masks and 65535 of 16-bit masks are ignored.
    """

    leaves_pixels_unlabelled = False

    def __init__(self, path: str, split: str, options: MasksOptions):
        super().__init__(path, split, options)
        import datasets

        files = [self.path, *sorted(self.path.rglob("*"))]
        self.files = [file for file in files if file.is_file()]
        loaded = self._load(datasets)
        if isinstance(loaded, datasets.Dataset):
            loaded = {"": loaded}
        elif len(loaded) == 1:  # `train`, which is how the library calls what has no splits
            loaded = {"": next(iter(loaded.values()))}
        self._rows = {}
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
                AnnotatedPhoto(
                    name=f"{i:0{width}}",
                    split=split or split_of(name),
                    image=None,
                    annotation=(name, i),
                )
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
                return {int(number): name for number, name in names.items()}
        flat = [getattr(feature, "feature", feature) for feature in features.values()]
        labels = [feature for feature in flat if isinstance(feature, datasets.ClassLabel)]
        if len(labels) != 1:
            raise UserError(
                f"{self.path} does not name the classes of its masks; --classes FILE, a JSON as "
                '{"0": "wall", "1": "floor"}, does'
            )
        return dict(enumerate(labels[0].names))

    def _encoded(self, photo: AnnotatedPhoto, column: str) -> Path | EmbeddedFile:
        split, row = photo.annotation
        content = self._rows[split][row][column]
        if content["bytes"] is None:
            return Path(content["path"])
        return EmbeddedFile(content["bytes"], f"{self.path}, {column} {row} of {split}")

    def image_of(self, photo: AnnotatedPhoto) -> Path | EmbeddedFile:
        """Return the file of a photo, or its bytes."""
        return self._encoded(photo, self.options.image_column)

    def read(self, photo: AnnotatedPhoto, size: tuple[int, int]) -> ndarray:
        """Return the id of each pixel."""
        file = self._encoded(photo, self.options.mask_column)
        image = read_image(file, lambda image: image.copy(), ("PNG", "TIFF"))
        if image.mode not in ("L", "P", "I;16", "I"):
            raise UserError(f"{file} has mode {image.mode!r}; expected one id for each pixel")
        void = MOST_ID if image.mode.startswith("I") else 255
        number_of = {void: IGNORED} | {id_: id_ for id_ in self.classes}
        return number_values(np.array(image, np.int32), number_of, file)
