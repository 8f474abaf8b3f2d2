"""The formats of masks by name, and which one a file or folder has, told from its content."""

from pathlib import Path

from llava_bidir.common.errors import UsageError, UserError
from llava_bidir.common.files import read_json
from probes.config import MasksOptions

from .label_maps import ColourSource, FullAde20kSource, HubSource, PanopticSource
from .regions import CocoSource, LabelMeSource, YoloSource
from .source import SPLIT_NAMES, MaskSource

FORMATS: dict[str, type[MaskSource]] = {
    "coco": CocoSource,
    "panoptic": PanopticSource,
    "labelme": LabelMeSource,
    "yolo": YoloSource,
    "colour": ColourSource,
    "ade20k": FullAde20kSource,
    "datasets": HubSource,
}
FIRST_BYTES = 2**16  # of a JSON file, which can be gigabytes


def open_sources(options: MasksOptions) -> list[MaskSource]:
    """Return the sources that a command names: one, or one for each split.

    Raises:
        UsageError: The words name no sources, or there is no such format.
        UserError: A source cannot be read.
    """
    if options.format not in (None, *FORMATS):
        raise UsageError(f"--format {options.format}: expected one of {', '.join(FORMATS)}")
    named = _named_sources(options.sources)
    return [
        FORMATS[options.format or tell_format(Path(path))](path, split, options)
        for split, path in named
    ]


def _named_sources(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return split and path of each source: those of FROM, of its folders train and valid, or of SPLIT=FROM."""
    named = [word.partition("=") for word in words]
    if len(words) == 2 and {split for split, *_ in named} == {"training", "validation"}:
        return [(split, path) for split, _, path in named]
    if len(words) != 1:
        raise UsageError("expected one source, or training=A validation=B")
    folder = Path(words[0])
    splits = {SPLIT_NAMES[x.name]: str(x) for x in _folders(folder) if x.name in SPLIT_NAMES}
    has_own = any(
        (folder / name).exists() for name in ("data.yaml", "labelmap.txt", "classes.json")
    )
    if {"training", "validation"} <= splits.keys() and not has_own and not _is_saved(folder):
        return list(splits.items())
    return [("", words[0])]


def _folders(folder: Path) -> list[Path]:
    return [x for x in folder.iterdir() if x.is_dir()] if folder.is_dir() else []


def _is_saved(folder: Path) -> bool:
    """Return whether the library `datasets` has saved a folder."""
    return any(folder.glob("dataset_dict.json")) or any(folder.glob("*/*.parquet"))


def tell_format(path: Path) -> str:
    """Return the name of the format of a source.

    Raises:
        UserError: It is a JSON file or a folder of none of them.
    """
    if path.suffix in (".yaml", ".yml"):
        return "yolo"
    if path.suffix == ".json" and path.is_file():
        return _format_of_json(path)
    if not path.is_dir():
        return "datasets"
    if (path / "data.yaml").is_file():
        return "yolo"
    if (path / "labelmap.txt").is_file() or (path / "classes.json").is_file():
        return "colour"
    if next(path.rglob("*_seg.png"), None):
        return "ade20k"
    if _is_saved(path) or any(path.glob("*.parquet")) or any(path.glob("*.arrow")):
        return "datasets"
    files = sorted(path.rglob("*.json"))
    if files:
        return _format_of_json(files[0])
    raise UserError(f"{path} is of no format that is told from its content; --format says which")


def _format_of_json(file: Path) -> str:
    with file.open(encoding="utf-8", errors="replace") as stream:
        first = stream.read(FIRST_BYTES)
    if '"shapes"' in first:
        return "labelme"
    content = read_json(file)
    if "categories" not in content or not isinstance(content.get("annotations"), list):
        raise UserError(
            f"{file} is neither COCO's JSON (images, annotations, categories) nor LabelMe's (shapes)"
        )
    annotations = content["annotations"]
    is_panoptic = annotations and "segments_info" in annotations[0]
    return "panoptic" if is_panoptic else "coco"
