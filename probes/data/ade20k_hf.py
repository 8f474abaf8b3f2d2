"""ADE20K SceneParse150 from the Hugging Face hub, or a folder of its parquet files, through `datasets`.

Rows have an image and an annotation, whose labels are as in the official files: 1 to 150, 0 = other. They stay in the
Arrow files until they are asked for.
"""

from pathlib import Path

from llava_bidir.common.errors import UserError

from .ade20k import CLASSES, LOOKUP, PALETTE, SIZES
from .base import BadFile, Embedded, SegmentationDataset

SPLITS = {"training": "train", "validation": "validation"}
COLUMNS = ("image", "annotation")


class ADE20KOnHub(SegmentationDataset):
    """Rows of a hub dataset.

    Args:
        root: Hub id ("zhoubolei/scene_parse_150") or folder of parquet files.
        split: "training" or "validation".
        folder: Folder in it that has the splits' files: on the hub a configuration's name; empty for `root` itself.
        revision: Branch or commit on the hub. `datasets` runs no loading scripts, so the branch of a script's converted
            files it is, as long as the dataset's main one holds a script.

    Raises:
        UserError: No such dataset or split, or it lacks a column.
    """

    def __init__(self, root: str, split: str, folder: str = "scene_parsing", revision: str = "refs/convert/parquet"):
        import datasets  # takes a second, and no other layout needs it

        if split not in SPLITS:
            raise UserError(f"ADE20K has the splits {', '.join(SPLITS)}, not {split!r}")
        where = f"{root}{f', folder {folder}' if folder else ''}"
        options = {} if Path(root).is_dir() else {"revision": revision}
        try:
            rows = datasets.load_dataset(str(root), data_dir=folder or None, split=SPLITS[split], **options)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise UserError(
                f"data.root: cannot load the {SPLITS[split]} split of {where}: {error}; data.options.folder and "
                "data.options.revision say where its parquet files are"
            ) from None
        missing = [name for name in COLUMNS if name not in rows.column_names]
        if missing:
            raise UserError(f"{where} lacks the column {missing[0]!r}; it has {', '.join(rows.column_names)}")
        for name in COLUMNS:  # not decoded by `datasets`, which would turn photos by their EXIF tags
            try:
                rows = rows.cast_column(name, datasets.Image(decode=False))
            except (TypeError, ValueError, NotImplementedError) as error:  # Arrow's own are these, too
                raise UserError(
                    f"{where}: its column {name!r} holds no images, but {rows.features[name]}: {error}"
                ) from None
        self._rows, self._where = rows.select_columns(list(COLUMNS)), f"{where}, {split}"
        names = [f"{split}_{i:08d}" for i in range(len(rows))]
        super().__init__(dict.fromkeys(names, ()), CLASSES, LOOKUP, PALETTE)
        self.official_size = SIZES[split]

    def files(self, index: int) -> tuple[Embedded, Embedded]:
        row = self._rows[index]
        return tuple(_embedded(row[name], f"{self._where}, row {index}, {name}") for name in COLUMNS)


def _embedded(cell: dict | None, where: str) -> Embedded:
    if cell is None or cell["bytes"] is None:  # a path instead could be that of any file of this machine
        raise BadFile(f"{where} has no bytes; the images must lie in the parquet files", "missing")
    return Embedded(cell["bytes"], where)
