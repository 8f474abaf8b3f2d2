"""ADE20K SceneParse150 from the Hugging Face hub, or from a folder of its parquet files.

Each row has an image and an annotation with the labels of the official files: 1 to 150, 0 = other. Rows stay in Arrow
files until they are read.
"""

from pathlib import Path

from llava_bidir.common.errors import UserError
from llava_bidir.common.identity import checksums, describe

from .ade20k import CLASSES, LOOKUP, PALETTE, SIZES
from .base import BadFile, EmbeddedFile, SegmentationDataset

SPLITS = {"training": "train", "validation": "validation"}
COLUMNS = ("image", "annotation")


class ADE20KOnHub(SegmentationDataset):
    """ADE20K as a dataset of the Hugging Face hub.

    Args:
        root: Hub id ("zhoubolei/scene_parse_150") or folder of parquet files.
        split: "training" or "validation".
        folder: Subfolder with the files of the splits (on the hub: name of the configuration); "" for `root` itself.
        revision: Branch or commit on the hub. The default is the branch of converted parquet files, because the main
            branch holds a loading script and `datasets` does not run scripts.

    Raises:
        UserError: If the dataset or split does not exist, or a column is missing.
    """

    def __init__(self, root: str, split: str, folder: str = "scene_parsing", revision: str = "refs/convert/parquet"):
        import datasets  # slow to import, and no other layout needs it

        if split not in SPLITS:
            raise UserError(f"ADE20K has the splits {', '.join(SPLITS)}, not {split!r}")
        source = f"{root}{f', folder {folder}' if folder else ''}"
        options = {} if Path(root).is_dir() else {"revision": revision}
        try:
            rows = datasets.load_dataset(str(root), data_dir=folder or None, split=SPLITS[split], **options)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise UserError(
                f"data.root: cannot load the {SPLITS[split]} split of {source}: {error}; set data.options.folder and "
                "data.options.revision to the location of the parquet files"
            ) from None
        missing = [name for name in COLUMNS if name not in rows.column_names]
        if missing:
            raise UserError(f"{source} has no column {missing[0]!r}; it has {', '.join(rows.column_names)}")
        for name in COLUMNS:  # decode=False: `datasets` would rotate photos by their EXIF tags
            try:
                rows = rows.cast_column(name, datasets.Image(decode=False))
            except (TypeError, ValueError, NotImplementedError) as error:  # Arrow's errors are subclasses of these
                raise UserError(
                    f"{source}: column {name!r} holds {rows.features[name]}, expected images: {error}"
                ) from None
        self._rows, self._source = rows.select_columns(list(COLUMNS)), f"{source}, {split}"
        names = [f"{split}_{i:08d}" for i in range(len(rows))]
        super().__init__(dict.fromkeys(names, ()), CLASSES, LOOKUP, PALETTE)
        self.official_size = SIZES[split]

    def identity(self) -> dict[str, str]:
        """Return what the split is: number and digest of its rows, by the content of their Arrow files."""
        files = [Path(file["filename"]) for file in self._rows.cache_files]
        digests = [checksums(file.parent, [file.name])[file.name] for file in files]
        return {"rows": describe(digests, len(self))}

    def files(self, index: int) -> tuple[EmbeddedFile, EmbeddedFile]:
        """Return the image and the mask of a row."""
        row = self._rows[index]
        return tuple(_embedded_file(row[name], f"{self._source}, row {index}, {name}") for name in COLUMNS)


def _embedded_file(cell: dict | None, name: str) -> EmbeddedFile:
    if cell is None or cell["bytes"] is None:  # a path is not followed: it could name any file of this machine
        raise BadFile(f"{name} has no bytes; the images must be stored in the parquet files", "missing")
    return EmbeddedFile(cell["bytes"], name)
