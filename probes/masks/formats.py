"""The formats of masks by name, and which one a file or folder has, told from its content."""

from pathlib import Path

from llava_bidir.common.errors import UsageError, UserError
from llava_bidir.common.files import read_json
from probes.config import MasksOptions

from .label_maps import ColourSource, FullAde20kSource, HubSource, PanopticSource
from .regions import CocoSource, LabelMeSource, YoloSource
from .source import MOST_ID, SPLIT_NAMES, MaskSource

FORMATS: dict[str, type[MaskSource]] = {
    "coco": CocoSource,
    "panoptic": PanopticSource,
    "labelme": LabelMeSource,
    "yolo": YoloSource,
    "colour": ColourSource,
    "ade20k": FullAde20kSource,
    "datasets": HubSource,
}
SIGNS = (  # files by which a folder is told
    ("data.yaml", "yolo"),
    ("labelmap.txt", "colour"),
    ("classes.json", "colour"),
    ("*_seg.png", "ade20k"),
    ("*.parquet", "datasets"),
    ("*.arrow", "datasets"),
)


def open_sources(options: MasksOptions) -> list[MaskSource]:
    """Return the sources that a command names: one, or one for each split.

    Raises:
        UsageError: The words name no sources, or there is no such format.
        UserError: A source cannot be read.
    """
    if options.format not in (None, *FORMATS):
        raise UsageError(f"--format {options.format}: expected one of {', '.join(FORMATS)}")
    named = _named_sources(options.sources)
    sources = []
    for split, path in named:
        source = FORMATS[options.format or tell_format(Path(path))](path, split, options)
        for number, name in source.classes.items():
            if not 0 <= number <= MOST_ID:
                raise UserError(
                    f"{path}: the class {name} has the id {number}; expected 0 to {MOST_ID}"
                )
        sources.append(source)
    return sources


def _named_sources(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return split and path of each source: those of FROM, of its folders train and valid, or of SPLIT=FROM."""
    named = [word.partition("=") for word in words]
    if len(words) == 2 and {split for split, *_ in named} == {"training", "validation"}:
        return [(split, path) for split, _, path in named]
    if len(words) != 1:
        raise UsageError("expected one source, or training=A validation=B")
    folder = Path(words[0])
    parts = [] if (folder / "dataset_dict.json").is_file() else sorted(folder.glob("*/*.json"))
    splits = {SPLIT_NAMES[x.parent.name]: x.parent for x in parts if x.parent.name in SPLIT_NAMES}
    if {"training", "validation"} <= splits.keys():
        return [(split, str(part)) for split, part in splits.items()]
    return [("", words[0])]


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
    for pattern, name in SIGNS:
        if next(path.rglob(pattern), None):
            return name
    files = sorted(path.rglob("*.json"))
    if files:
        return _format_of_json(files[0])
    raise UserError(f"{path} is of no format that is told from its content; --format says which")


def _format_of_json(file: Path) -> str:
    content = read_json(file)
    if "shapes" in content:
        return "labelme"
    annotations = content.get("annotations")
    if not isinstance(annotations, list) or "categories" not in content:
        raise UserError(
            f"{file} is neither COCO's JSON (images, annotations, categories) nor LabelMe's (shapes)"
        )
    is_panoptic = any("segments_info" in annotation for annotation in annotations[:1])
    return "panoptic" if is_panoptic else "coco"
