"""Read every image and target before a model is loaded, to find bad files in seconds instead of after GPU hours."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy import ndarray
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from llava_bidir.common.errors import UserError
from llava_bidir.common.processes import worker_options
from probes.data.base import BadFile, ImageDataset
from probes.ops.pixel_counts import IGNORE_INDEX

BATCH_SIZE = 16
FILES_PER_KIND = 3  # in the error message
UNLABELLED = "no labelled pixel in any {} of {}"  # target, split


class _PairDefects(Dataset):
    """The defect (kind, message) of each pair, or None, and its labels; pairs are decoded as in training."""

    def __init__(self, dataset: ImageDataset, name: str):
        self.dataset = dataset
        self.name = name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[tuple[str, str] | None, ndarray | None]:
        try:
            target = self.dataset[index]["target"]
        except BadFile as error:
            return (error.kind, str(error)), None
        return self._defect(index, target), count_labels(target, len(self.dataset.classes))

    def _defect(self, index: int, target: ndarray) -> tuple[str, str] | None:
        if not self.dataset.classes:
            return None
        kind = UNLABELLED.format(self.dataset.target_name, self.name)
        file = self.dataset.files(index)[-1]
        if (target == IGNORE_INDEX).all():
            return kind, f"{file}: all pixels are ignored; check which labels are"
        if self.dataset.task == "boundaries" and not (target == 1).any():
            return (
                kind,
                f"{file}: no pixel is a boundary; where objects have an ignored border, as in VOC, none can be",
            )
        return None


def find_bad_files(
    dataset: ImageDataset,
    name: str,
    indices: Iterable[int],
    workers: int,
    progress: bool = True,
    counts: list[ndarray] | None = None,
) -> list[tuple[str, str]]:
    """Return (kind, message) of each pair that cannot be used, also of targets without a labelled pixel.

    Args:
        dataset: A split.
        name: Name of the split, for messages and the progress bar.
        indices: The pairs to read.
        workers: Processes; with 0, or for few images, the pairs are read in this process.
        progress: Show a progress bar.
        counts: Takes the labels of each image that can be read, see :func:`count_labels`.
    """
    indices = list(indices)
    few = len(indices) <= 4 * BATCH_SIZE  # reading them takes less time than starting a process
    loader = DataLoader(
        _PairDefects(dataset, name),
        batch_size=BATCH_SIZE,
        sampler=indices,
        collate_fn=list,
        **worker_options(0 if few else workers),
        # the loader draws a seed, which must not advance the generator of the run
        generator=torch.Generator(),
    )
    defects: list[tuple[str, str]] = []
    with tqdm(
        total=len(indices),
        desc=f"checking {name}",
        unit=" images",
        mininterval=1,
        disable=not progress,
    ) as bar:
        for results in loader:
            bar.update(len(results))
            defects += [defect for defect, _ in results if defect]
            if counts is not None:
                counts += [labels for _, labels in results if labels is not None]
    return defects


def leave_out_unlabelled(
    bad_files: list[tuple[str, str]], splits: dict[str, ImageDataset]
) -> list[tuple[str, str]]:
    """Return the bad files without unlabelled targets, unless all of a split are; `splits` by name."""
    found = Counter(kind for kind, _ in bad_files)
    images = {
        UNLABELLED.format(dataset.target_name, name): len(dataset)
        for name, dataset in splits.items()
    }
    return [
        (kind, message)
        for kind, message in bad_files
        if found[kind] == images.get(kind, found[kind])
    ]


def format_bad_files(bad_files: list[tuple[str, str]], images: int) -> str:
    """Return a summary: the number of files per kind of defect, and the first messages of each."""
    by_kind: dict[str, list[str]] = {}
    for kind, message in bad_files:
        by_kind.setdefault(kind, []).append(message)
    lines = [f"{len(bad_files)} of {images} images cannot be used:"]
    for kind, messages in by_kind.items():
        lines.append(f"  {len(messages)} x {kind}")
        lines += [f"    {message}" for message in sorted(messages)[:FILES_PER_KIND]]
        if len(messages) > FILES_PER_KIND:
            lines += [f"    ... and {len(messages) - FILES_PER_KIND} more"]
    return "\n".join(lines)


FEW_IMAGES = 5  # a class in fewer images has an IoU of single images
MUCH_IGNORED = 1 / 3
MOST_NAMES = 8  # in a message


class LabelCounts(NamedTuple):
    """Labels of a split.

    Args:
        images: Images that were counted.
        pixels: i64[K], labelled pixels of each class; of targets without classes, pixels with a value.
        images_of_class: i64[K], images in which the class is labelled.
        ignored: Pixels that are ignored, or have no value.
    """

    images: int
    pixels: list[int]
    images_of_class: list[int]
    ignored: int

    @property
    def ignored_share(self) -> float:
        """Share of the pixels that do not count; 0 without pixels."""
        return self.ignored / max(1, self.ignored + sum(self.pixels))


def count_labels(target: ndarray, classes: int) -> ndarray:
    """Return the labelled pixels of each class and the ignored ones, i64[K + 1], of a target of any task.

    Args:
        target: uint8[H, W], 255 ignored; or floats [H, W] or [H, W, channels], NaN where there is no value.
        classes: K; 0 for targets of real numbers, whose pixels with a value are counted as one class.
    """
    if not classes:
        valid = np.isfinite(target)
        valid = valid.all(-1) if valid.ndim == 3 else valid
        return np.array([valid.sum(), (~valid).sum()])
    found = np.bincount(target.ravel(), minlength=IGNORE_INDEX + 1)
    return np.append(found[:classes], found[IGNORE_INDEX])


def add_counts(counts: Iterable[ndarray], classes: int) -> LabelCounts:
    """Return the counts of a split from those of its images, see :func:`count_labels`."""
    rows = np.array([*counts], dtype=np.int64).reshape(-1, max(classes, 1) + 1)
    pixels = rows[:, :-1]
    return LabelCounts(
        images=len(rows),
        pixels=pixels.sum(0).tolist(),
        images_of_class=(pixels > 0).sum(0).tolist(),
        ignored=int(rows[:, -1].sum()),
    )


def join_counts(parts: Sequence[LabelCounts]) -> LabelCounts:
    """Return the counts of disjoint parts of a split together."""
    added = [np.sum(values, 0).tolist() for values in zip(*parts, strict=True)]
    return LabelCounts(*added)


def check_labels(
    classes: list[str],
    labels: dict[str, LabelCounts],
    own_classes: bool,
    source: str,
) -> None:
    """Raise if training images do not have the labels of the classes that probes are to tell apart.

    Classes that are published with a layout can be absent from a part of it, and so can any class from fewer than
    `FEW_IMAGES` images per class; :func:`label_notes` says so.

    Args:
        classes: Names of the classes.
        labels: Counts by split.
        own_classes: The names are those of this data set, in its classes.json.
        source: Folder of the data, for the message.

    Raises:
        UserError: One class is labelled at most, or a class of classes.json never is.
    """
    training = labels["training"]
    absent = [i for i, pixels in enumerate(training.pixels) if not pixels]
    if len(classes) - len(absent) < 2:
        found = [name for i, name in enumerate(classes) if i not in absent]
        what = f"of the class {found[0]!r}" if found else "ignored"
        raise UserError(
            f"{source}: all labelled training pixels are {what}, so that a probe is right everywhere; check the labels "
            f"of the masks, and which are ignored ({len(classes)} classes are listed: {_some(classes)})"
        )
    if absent and own_classes and training.images >= FEW_IMAGES * len(classes):
        names = [classes[i] for i in absent]
        raise UserError(
            f"{source}: no pixel of {training.images:,} training masks is labelled {_some(names)}, which classes.json "
            "lists; check the labels of the masks. If the data have no such class, ignore its label: "
            '"ignore_index": [LABEL, 255]'
        )


def label_notes(classes: list[str], labels: dict[str, LabelCounts]) -> list[str]:
    """Return what a reader of scores must know about the labels of both splits."""
    training = labels["training"]
    validation = labels["validation"]
    by_class = list(
        zip(classes, training.images_of_class, validation.images_of_class, strict=False)
    )
    untrained = [name for name, train, val in by_class if not train and val]
    unscored = [name for name, train, val in by_class if train and not val]
    absent = [name for name, train, val in by_class if not train and not val]
    notes = []
    if untrained:
        notes.append(
            f"No training pixel is labelled {_some(untrained)}, so that the IoU there is 0."
        )
    if unscored:
        notes.append(
            f"No validation pixel is labelled {_some(unscored)}: the IoU there is 0 at sites whose probe predicts it, "
            "and left out of mIoU at others, so that these are not of the same classes. Ignore its label."
        )
    if absent:
        notes.append(f"No pixel of either split is labelled {_some(absent)}.")
    for split, column in (("training", 1), ("validation", 2)):
        few = [f"{row[0]} ({row[column]})" for row in by_class if 0 < row[column] < FEW_IMAGES]
        if few:
            notes.append(f"In fewer than {FEW_IMAGES} {split} images: {_some(few)}.")
        if labels[split].ignored_share > MUCH_IGNORED:
            notes.append(
                f"{labels[split].ignored_share:.0%} of the {split} pixels are ignored or have no value."
            )
    return notes


def format_labels(classes: list[str], labels: dict[str, LabelCounts]) -> str:
    """Return a table for the terminal: labelled pixels and images of each class, in each split."""
    rows = [["class", *(f"{split} {what}" for split in labels for what in ("pixels", "images"))]]
    for i, name in enumerate(classes or ["value"]):
        counts = [(of.pixels[i], of.images_of_class[i]) for of in labels.values()]
        rows.append([name, *(f"{number:,}" for pair in counts for number in pair)])
    shares = [text for of in labels.values() for text in (f"{of.ignored_share:.1%}", "")]
    rows.append(["ignored" if classes else "no value", *shares])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *numbers in rows:
        cells = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def shared_image_note(pairs: list[tuple[str, str]]) -> str:
    """Return how many images stand in training and validation, and the names of some; `pairs` are of their names."""
    names = _some([ours if ours == theirs else f"{ours} = {theirs}" for ours, theirs in pairs])
    verb = "image stands" if len(pairs) == 1 else "images stand"
    return f"{len(pairs)} {verb} in training and in validation, byte for byte, which raises scores: {names}."


def notes_of_run(classes: list[str], data: dict[str, Any]) -> list[str]:
    """Return the notes about the data of a run, from `manifest.json["data"]`; none for a run that has not counted."""
    notes = []
    if labels := data.get("labels"):
        notes += label_notes(
            classes, {split: LabelCounts(**counts) for split, counts in labels.items()}
        )
    if pairs := data.get("shared_images"):
        notes.append(shared_image_note([(ours, theirs) for ours, theirs in pairs]))
    return notes


def _some(names: list[str]) -> str:
    """Return names with commas, of many the first ones and how many more there are."""
    rest = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")
