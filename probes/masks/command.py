"""`probes masks FROM ... --out DATA`: read, apply the rules, write the folder layout, say what is in it.

OUT/images/SPLIT/NAME.jpg          hard links to the originals, or copies where links cannot be
OUT/annotations/SPLIT/NAME.png     8 bits, or 16 for more than 255 classes
OUT/classes.json
OUT/masks.json                     what the folder was made from, and what is in it
OUT/preview.png                    eight photos with their masks
"""

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from traceback import clear_frames
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from llava_bidir.common.errors import UsageError, UserError
from llava_bidir.common.files import atomic_directory, read_json, write_files
from llava_bidir.common.identity import checksums, describe_digest, plain
from llava_bidir.common.images import orientation, read_image
from llava_bidir.common.processes import usable_cores
from probes.config import MasksOptions
from probes.data.folder import FolderDataset
from probes.data.image_dataset import TURNED, EmbeddedFile, check_size
from probes.data.sheet import draw_sheet
from probes.data.split import split_names
from probes.data.verify import (
    LabelCounts,
    check_pairs,
    count_labels,
    data_notes,
    format_labels,
    join_counts,
    read_all,
)
from probes.ops.geometry import IGNORE_INDEX, ignore_index_of

from .formats import open_sources
from .rules import MaskRules, words_of_classes
from .source import IGNORED, AnnotatedPhoto, MaskSource

RECORD = "masks.json"
SPLITS = ("training", "validation")
SUFFIX_OF = {"MPO": "jpeg"}  # Pillow's name of a JPEG with a second picture


class Written(NamedTuple):
    """What is in the masks of a photo: its labels, pixels without an annotation, and those of two classes."""

    labels: LabelCounts
    unlabelled: int
    overlapping: int


def run(options: MasksOptions) -> None:
    """Write the folder layout of what the sources have, unless it is there already.

    Raises:
        UsageError: A rule that moves scores is not said.
        UserError: A source cannot be used, a split is empty, or the folder has something else.
    """
    sources = open_sources(options)
    leaves_some = any(source.leaves_pixels_unlabelled for source in sources)
    if options.unlabelled is None and (leaves_some or words_of_classes(options)):
        raise UsageError(
            "--unlabelled needs to say what pixels are that no annotation has: ignore, or the name of a class; it "
            "moves scores"
        )
    made_from = _identity(sources, options)
    record = options.out / RECORD
    if record.is_file():
        content = read_json(record)
        if content["made_from"] != made_from:
            raise UserError(
                f"{options.out} was made of other sources or with other rules; choose another --out, or remove it"
            )
        print(*content["said"], f"{options.out} is there already", sep="\n")
        return
    names = [name for source in sources for _, name in sorted(source.classes.items())]
    rules = MaskRules.of(options, list(dict.fromkeys(names)))
    photos = _photos_by_split(sources, options)
    with atomic_directory(options.out, RECORD) as folder:
        written = {
            split: _write_split(folder, split, pairs=photos[split], rules=rules) for split in SPLITS
        }
        results = list(chain.from_iterable(written.values()))
        check_pairs([text for text in results if isinstance(text, str)], len(results))
        # the label that is ignored is its default: 255, or 65535 of more classes
        write_files({folder / "classes.json": {"classes": rules.names}})
        said = _say(rules.names, written)
        datasets = {split: FolderDataset(folder, split) for split in SPLITS}
        draw_sheet(datasets, [x.labels.pixels for x in results]).save(folder / "preview.png")
        write_files({folder / RECORD: {"made_from": made_from, "said": said}})
    print(*said, f"look at {options.out / 'preview.png'}: do the masks fit?", sep="\n")


def _identity(sources: Sequence[MaskSource], options: MasksOptions) -> dict[str, Any]:
    """Return what a folder is made from: rules, and annotations and photos by content and name."""
    identity: dict[str, Any] = plain(asdict(options))
    del identity["out"]
    for number, source in enumerate(sources):
        digests = checksums("", map(str, source.files))
        photos = [(photo.name, photo.split, str(photo.image)) for photo in source.photos]
        identity[f"source_{number}"] = describe_digest([[*digests.values()], photos], len(photos))
    return identity


def _photos_by_split(
    sources: Sequence[MaskSource], options: MasksOptions
) -> dict[str, list[tuple[MaskSource, AnnotatedPhoto]]]:
    """Return the photos of each split with their sources, as the sources or --validation say it.

    Raises:
        UsageError: Neither or both do.
        UserError: A split is empty, or two of its photos have one name.
    """
    pairs = [(source, photo) for source in sources for photo in source.photos]
    have_splits = {bool(photo.split) for _, photo in pairs}
    if have_splits - {options.validation is None}:
        raise UsageError(
            "splits come from the source, or from training=A validation=B, or from a share, --validation 0.2, where "
            "--groups REGEX keeps together what belongs together, as frames of a video: from one of these"
        )
    if options.validation is not None:
        _check_names(pairs)
        names = [photo.name for _, photo in pairs]
        drawn = split_names(names, options.validation, seed=options.seed, groups=options.groups)
        split_of_name = {
            name: split for split, part in zip(SPLITS, drawn, strict=True) for name in part
        }
        pairs = [
            (source, photo._replace(split=split_of_name[photo.name])) for source, photo in pairs
        ]
    by_split = {split: [pair for pair in pairs if pair[1].split == split] for split in SPLITS}
    for split, part in by_split.items():
        if not part:
            raise UserError(f"{options.sources[0]} has no {split} photos")
        _check_names(part)
    left_out = len(pairs) - sum(map(len, by_split.values()))
    if left_out:
        print(f"{left_out:,} photos of other splits (test) are left out")
    return by_split


def _check_names(pairs: Sequence[tuple[MaskSource, AnnotatedPhoto]]) -> None:
    names = Counter(photo.name for _, photo in pairs)
    [(name, count)] = names.most_common(1)
    if count > 1:
        files = [str(photo.image) for _, photo in pairs if photo.name == name]
        raise UserError(f"{count} images of one name, {name!r}: {', '.join(files)}; rename them")


class Conversion(Dataset):
    """Photos that are written when they are read: what is in their masks, or what is wrong with them.

    Args:
        folder: The folder that is written.
        split: Of the photos.
        pairs: Photos with their sources.
        rules: How annotations become classes.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        pairs: list[tuple[MaskSource, AnnotatedPhoto]],
        rules: MaskRules,
    ):
        self.images = folder / "images" / split
        self.masks = folder / "annotations" / split
        self.pairs = pairs
        self.rules = rules

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Written | str:
        """Return what was written for a photo, or the message of its error."""
        source, photo = self.pairs[index]
        try:
            return self._write(source, photo)
        except UserError as error:
            return str(error)

    def _write(self, source: MaskSource, photo: AnnotatedPhoto) -> Written:
        image = source.image_of(photo)
        tag, size, kind = read_image(image, lambda x: (orientation(x), x.size, x.format))
        if photo.size:  # before regions are drawn
            check_size(image, tag, size, photo.size, target=f"annotation in {source.path}")
        annotation = source.read(photo, size)
        if not isinstance(annotation, list):
            check_size(image, tag, size, annotation.shape[::-1], target=f"mask of {photo.name}")
        elif not photo.size:  # shares of the sides of the upright photo, or of the stored one
            upright = size[::-1] if tag in TURNED else size
            check_size(image, tag, size, upright, target=f"annotation of {photo.name}")
        composed = self.rules.compose(annotation, size, source.classes)
        names = self.rules.names
        target = np.where(
            composed.classes == IGNORED, ignore_index_of(len(names)), composed.classes
        )
        mask = target.astype(np.uint8 if len(names) <= IGNORE_INDEX else np.uint16)  # -1 is 65535
        Image.fromarray(mask).save(self.masks / f"{photo.name}.png")
        self._put_image(image, f"{photo.name}.{SUFFIX_OF.get(kind, kind.lower())}")
        signed = mask if mask.itemsize == 1 else mask.view(np.int16)
        return Written(count_labels(signed, len(names)), composed.unlabelled, composed.overlapping)

    def _put_image(self, image: Path | EmbeddedFile, name: str) -> None:
        """Link an image, which leaves the original as it is, or copy it."""
        copy = self.images / name
        if isinstance(image, EmbeddedFile):
            copy.write_bytes(image.getvalue())
            return
        copy = copy.with_suffix(image.suffix.lower())
        try:
            os.link(image.resolve(), copy)
        except OSError:  # another file system, or one without links
            shutil.copyfile(image, copy)


def _write_split(
    folder: Path, split: str, pairs: list[tuple[MaskSource, AnnotatedPhoto]], rules: MaskRules
) -> list[Written | str]:
    """Write the photos of a split, and return what is in their masks, or what is wrong with them."""
    conversion = Conversion(folder, split, pairs=pairs, rules=rules)
    for part in (conversion.images, conversion.masks):
        part.mkdir(parents=True)
    try:
        return read_all(
            conversion, f"writing {split}", indices=range(len(pairs)), workers=usable_cores()
        )
    except BaseException as error:
        # processes end with the loader's iterator, before the folder in which they write is deleted
        clear_frames(error.__traceback__)
        raise


def _say(names: list[str], written: dict[str, list[Written]]) -> list[str]:
    """Return the table of classes and splits, what is unlabelled, claimed twice or ignored, and what is missing."""
    labels = {split: join_counts([x.labels for x in part]) for split, part in written.items()}
    lines = [format_labels(names, labels)]
    for split, part in written.items():
        counts = labels[split]
        pixels = sum(counts.pixels) + counts.ignored
        shares = {
            "unlabelled": sum(x.unlabelled for x in part),
            "claimed by two classes": sum(x.overlapping for x in part),
            "ignored": counts.ignored,
        }
        texts = [f"{count / pixels:.1%} {what}" for what, count in shares.items()]
        lines.append(f"{split} pixels: {', '.join(texts)}")
    return lines + data_notes(names, labels, {})
