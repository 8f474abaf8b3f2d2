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
from functools import partial
from itertools import chain
from pathlib import Path
from traceback import clear_frames
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

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
    call_all,
    check_pairs,
    count_labels,
    data_notes,
    format_labels,
    join_counts,
)
from probes.ops.geometry import IGNORE_INDEX

from .formats import open_sources
from .rules import MaskRules, words_of_classes
from .source import AnnotatedPhoto, LabelMap, MaskSource

RECORD = "masks.json"
SPLITS = ("training", "validation")


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
    rules = MaskRules.of(options, [*dict.fromkeys(name for x in sources for name in x.names)])
    photos = _photos_by_split([photo for source in sources for photo in source.photos], options)
    with atomic_directory(options.out, RECORD) as folder:
        written = {split: _write_split(folder, split, photos[split], rules) for split in SPLITS}
        results = list(chain.from_iterable(written.values()))
        check_pairs([text for text in results if isinstance(text, str)], len(results))
        # the label that is ignored is its default: 255, or 65535 of more classes
        content: dict[str, list] = {"classes": rules.names}
        colour_of = {name: rgb for source in sources for name, rgb in source.colour_of.items()}
        if all(name in colour_of for name in rules.names):
            content["palette"] = [colour_of[name] for name in rules.names]
        write_files({folder / "classes.json": content})
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
        photos = [(photo.name, photo.split, photo.image_name) for photo in source.photos]
        identity[f"source_{number}"] = describe_digest([[*digests.values()], photos], len(photos))
    return identity


def _photos_by_split(
    photos: list[AnnotatedPhoto], options: MasksOptions
) -> dict[str, list[AnnotatedPhoto]]:
    """Return the photos of each split, as the sources or --validation say it.

    Raises:
        UsageError: Neither or both do.
        UserError: A split is empty, or two of its photos have one name.
    """
    if {bool(photo.split) for photo in photos} - {options.validation is None}:
        raise UsageError(
            "splits come from the source, or from training=A validation=B, or from a share, --validation 0.2, where "
            "--groups REGEX keeps together what belongs together, as frames of a video: from one of these"
        )
    kept = [photo for photo in photos if photo.split in ("", *SPLITS)]
    if len(kept) < len(photos):
        print(f"{len(photos) - len(kept):,} photos of other splits (test) are left out")
    for (_, name), count in Counter((photo.split, photo.name) for photo in kept).items():
        if count > 1:
            files = ", ".join(photo.image_name for photo in kept if photo.name == name)
            raise UserError(f"{count} images of one name, {name!r}: {files}; rename them")
    if options.validation is not None:
        names = [photo.name for photo in kept]
        training, _ = split_names(
            names, options.validation, seed=options.seed, groups=options.groups
        )
        split_of_name = dict.fromkeys(names, "validation") | dict.fromkeys(training, "training")
        kept = [photo._replace(split=split_of_name[photo.name]) for photo in kept]
    by_split = {split: [photo for photo in kept if photo.split == split] for split in SPLITS}
    for split, part in by_split.items():
        if not part:
            raise UserError(f"{options.sources[0]} has no {split} photos")
    return by_split


def _write_split(
    folder: Path, split: str, photos: list[AnnotatedPhoto], rules: MaskRules
) -> list[Written | str]:
    """Write the photos of a split, and return what is in their masks, or what is wrong with them."""
    images = folder / "images" / split
    masks = folder / "annotations" / split
    for part in (images, masks):
        part.mkdir(parents=True)

    def write(index: int) -> Written:
        photo = photos[index]
        image = photo.open()
        written = write_mask(photo, image, rules, masks / f"{photo.name}.png")
        put_image(image, images / photo.name)
        return written

    try:
        return call_all(
            write, f"writing {split}", indices=range(len(photos)), workers=usable_cores()
        )
    except BaseException as error:
        # processes end with the loader's iterator, before the folder in which they write is deleted
        clear_frames(error.__traceback__)
        raise


def write_mask(
    photo: AnnotatedPhoto, image: Path | EmbeddedFile, rules: MaskRules, file: Path
) -> Written:
    """Write the mask of a photo, and return what is in it.

    Raises:
        UserError: The annotation is of another size than the image, or cannot be read.
    """
    tag, size = read_image(image, lambda x: (orientation(x), x.size))
    check = partial(check_size, image, tag, size, target=f"annotation of {photo.name}")
    if photo.size:  # before regions are drawn
        check(photo.size)
    annotation = photo.read(size)
    if isinstance(annotation, LabelMap):
        check(annotation.numbers.shape[::-1])
    elif not photo.size:  # shares of the sides of the upright photo, or of the stored one
        check(size[::-1] if tag in TURNED else size)
    target, unlabelled, overlapping = rules.compose(annotation, size)
    classes = len(rules.names)
    bits = 8 if classes <= IGNORE_INDEX else 16
    mask = target.astype(f"uint{bits}", order="C")  # of -1, which is ignored, 255 or 65535
    Image.fromarray(mask).save(file)
    signed = mask if bits == 8 else mask.view(np.int16)
    return Written(count_labels(signed, classes), unlabelled, overlapping)


def put_image(image: Path | EmbeddedFile, copy: Path) -> None:
    """Link an image, which leaves the original as it is, or copy it; the suffix is added."""
    if isinstance(image, EmbeddedFile):
        suffix = read_image(image, lambda x: x.format).lower()
        suffix = suffix.replace("mpo", "jpeg")  # a JPEG with a second picture
        Path(f"{copy}.{suffix}").write_bytes(image.getvalue())
        return
    copy = Path(f"{copy}{image.suffix.lower()}")
    try:
        os.link(image.resolve(), copy)
    except OSError:  # another file system, or one without links
        shutil.copyfile(image, copy)


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
