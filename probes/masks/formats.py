"""The formats of masks by name, and which one a file or folder has, told from its content."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from llava_bidir.common.errors import UsageError, UserError
from probes.config import MasksOptions

from .label_maps import read_colour_masks, read_data_set, read_full_ade20k, read_panoptic
from .regions import read_coco, read_labelme, read_objects, read_yolo
from .source import SPLIT_NAMES, MaskSource

FORMATS: dict[str, Callable[[Path, MasksOptions], MaskSource]] = {
    "coco": partial(read_coco, read=read_objects),
    "panoptic": partial(read_coco, read=read_panoptic, leaves_pixels_unlabelled=False),
    "labelme": read_labelme,
    "yolo": read_yolo,
    "colour": read_colour_masks,
    "ade20k": read_full_ade20k,
    "datasets": read_data_set,
}
SIGNS = (  # files by which a folder is told
    ("data.yaml", "yolo"),
    ("labelmap.txt", "colour"),
    ("classes.json", "colour"),
    ("*_seg.png", "ade20k"),
    ("*.parquet", "datasets"),
    ("*.arrow", "datasets"),
)
KEYS = {"segments_info": "panoptic", "imagePath": "labelme", "categories": "coco"}  # of JSON


def open_sources(options: MasksOptions) -> list[MaskSource]:
    """Return the sources that a command names: one, or one for each split.

    Raises:
        UsageError: The words name no sources, or there is no such format.
        UserError: A source cannot be read.
    """
    if options.format not in (None, *FORMATS):
        raise UsageError(f"--format {options.format}: expected one of {', '.join(FORMATS)}")
    sources = []
    for split, path in _paths_by_split(options.sources).items():
        source = FORMATS[options.format or tell_format(path)](path, options)
        if split:
            source.photos = [photo._replace(split=split) for photo in source.photos]
        sources.append(source)
    return sources


def _paths_by_split(words: tuple[str, ...]) -> dict[str, Path]:
    """Return the source of each split, of FROM's folders train and valid or of SPLIT=FROM; else of "" FROM."""
    path_of = {split: Path(path) for split, _, path in (word.partition("=") for word in words)}
    if len(words) == 2 and path_of.keys() == {"training", "validation"}:
        return path_of
    if len(words) != 1:
        raise UsageError("expected one source, or training=A validation=B")
    folder = Path(words[0])
    if not (folder / "dataset_dict.json").is_file():
        parts = sorted({file.parent for file in folder.glob("*/*.json")})
        path_of = {SPLIT_NAMES[x.name]: x for x in parts if x.name in SPLIT_NAMES}
        if path_of.keys() >= {"training", "validation"}:
            return path_of
    return {"": folder}


def tell_format(path: Path) -> str:
    """Return the name of the format of a source.

    Raises:
        UserError: It is a JSON file or a folder of none of them.
    """
    if path.suffix in (".yaml", ".yml"):
        return "yolo"
    files = [path]
    if path.is_dir():
        for pattern, name in SIGNS:
            if any(path.rglob(pattern)):
                return name
        files = sorted(path.rglob("*.json"))[:1]
    elif path.suffix != ".json" or not path.is_file():
        return "datasets"
    for file in files:
        content = file.read_bytes()
        for key, name in KEYS.items():
            if f'"{key}"'.encode() in content:
                return name
    raise UserError(f"{path} is of no format that is told from its content; --format says which")
