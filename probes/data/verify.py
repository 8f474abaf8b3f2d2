"""Read every image and target before a model is loaded, to find bad files in seconds instead of after GPU hours."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy import ndarray
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from llava_bidir.common.errors import UserError
from llava_bidir.common.processes import worker_options
from probes.data.base import ImageDataset
from probes.ops.geometry import IGNORE_INDEX

BATCH_SIZE = 16
MOST_FILES = 10  # in the error message
FEW_IMAGES = 5  # a class in fewer images has an IoU of single images
MUCH_IGNORED = 1 / 3
MOST_NAMES = 8  # in a message
ABSENT = {  # notes on classes
    "training": "No training pixel is labelled {}, so that the IoU there is 0.",
    "validation": "No validation pixel is labelled {}: the IoU there is 0 at sites whose probe predicts it, and left "
    "out of mIoU at others, so that these are not of the same classes. Ignore its label.",
}


class LabelCounts(NamedTuple):
    """Labels of images.

    Args:
        images: Images that were counted.
        pixels: i64[K], labelled pixels of each class; of targets without classes, pixels with a value.
        images_of_class: i64[K], images in which the class is labelled.
        ignored: Pixels that are ignored, or have no value.
    """

    images: int
    pixels: Sequence[int]
    images_of_class: Sequence[int]
    ignored: int

    @property
    def ignored_share(self) -> float:
        """Share of the pixels that do not count; 0 without pixels."""
        return self.ignored / max(1, self.ignored + sum(self.pixels))


class _Pairs(Dataset):
    """The labels of each pair, or what is wrong with which file of it; pairs are decoded as in training."""

    def __init__(self, dataset: ImageDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> LabelCounts | str:
        try:
            return count_labels(self.dataset[index]["target"], len(self.dataset.classes))
        except UserError as error:
            return str(error)


def read_pairs(
    dataset: ImageDataset,
    name: str,
    indices: Sequence[int],
    workers: int,
    progress: bool = True,
) -> tuple[LabelCounts, list[str]]:
    """Return the labels of images, and what is wrong with those that cannot be used.

    Args:
        dataset: A split.
        name: Name of the split, for the progress bar.
        indices: The pairs to read.
        workers: Processes; with 0, or for few images, the pairs are read in this process.
        progress: Show a progress bar.
    """
    few = len(indices) <= 4 * BATCH_SIZE  # reading them takes less time than starting a process
    loader = DataLoader(
        _Pairs(dataset),
        batch_size=BATCH_SIZE,
        sampler=indices,
        collate_fn=list,
        **worker_options(0 if few else workers),
        # the loader draws a seed, which must not advance the generator of the run
        generator=torch.Generator(),
    )
    zero = [0] * max(1, len(dataset.classes))
    found: list[LabelCounts | str] = [LabelCounts(0, zero, zero, 0)]
    for pairs in tqdm(loader, f"checking {name}", mininterval=1, disable=not progress):
        found += pairs
    bad = [pair for pair in found if isinstance(pair, str)]
    return join_counts([pair for pair in found if not isinstance(pair, str)]), bad


def count_labels(target: ndarray, classes: int) -> LabelCounts:
    """Return the labels of one image, from its target of any task.

    Args:
        target: uint8[H, W], 255 ignored; or floats [H, W] or [H, W, channels], NaN where there is no value.
        classes: K; 0 for targets of real numbers, whose pixels with a value are counted as one class.
    """
    if classes:
        found = np.bincount(target.ravel(), minlength=IGNORE_INDEX + 1)
        return LabelCounts(1, found[:classes], found[:classes] > 0, found[IGNORE_INDEX])
    valid = np.isfinite(target).reshape(*target.shape[:2], -1).all(-1)
    return LabelCounts(1, [valid.sum()], [valid.any()], (~valid).sum())


def join_counts(parts: Sequence[LabelCounts]) -> LabelCounts:
    """Return the counts of disjoint parts of a split together."""
    return LabelCounts(
        *(np.sum(values, 0, dtype=int).tolist() for values in zip(*parts, strict=True))
    )


def check_pairs(bad: Sequence[str], images: int) -> None:
    """Raise a UserError if some of so many images cannot be used.

    Args:
        bad: What is wrong with which file.
        images: Number of images of both splits.
    """
    if bad:
        lines = [f"{len(bad)} of {images} images cannot be used:", *bad[:MOST_FILES]]
        more = ["..."] * (len(bad) > MOST_FILES)
        raise UserError("\n  ".join(lines + more))


def check_labels(classes: list[str], labels: Mapping[str, LabelCounts]) -> None:
    """Raise if images do not have the labels of the classes, or the values, that probes are to tell apart.

    A class can be absent from a split; :func:`data_notes` says so.

    Args:
        classes: Names of the classes; none if targets are real numbers.
        labels: Labels by split.

    Raises:
        UserError: A split has no value, or one class at most.
    """
    for split, counts in labels.items():
        names = classes or ["value"]
        present = [name for name, pixels in zip(names, counts.pixels, strict=True) if pixels]
        if len(present) < min(2, len(names)):
            raise UserError(
                f"the {split} targets have no other labels than {present}, so that a probe is right everywhere; check "
                "the labels, which of them are ignored, and the scale of values"
            )


def shared_images(a: ImageDataset, b: ImageDataset) -> list[tuple[str, str]]:
    """Return the names in both splits of the images that are the same byte for byte."""
    names = {
        digest: name for name, digest in zip(a.names, a.digests("images"), strict=True) if digest
    }
    found = zip(b.names, b.digests("images"), strict=True)
    return [(names[digest], name) for name, digest in found if digest in names]


def data_notes(
    classes: list[str],
    labels: Mapping[str, LabelCounts],
    shared: Sequence[Sequence[str]],
) -> list[str]:
    """Return what a reader of scores must know about the data, after the files were checked.

    Args:
        classes: Names of the classes.
        labels: Labels by split; none if they were not counted.
        shared: Names in both splits of the images that are the same.
    """
    texts: dict[str, list[str]] = {}  # the names that a note is about, by note
    for split, counts in labels.items():
        by_class = list(zip(classes, counts.images_of_class, strict=False))
        texts[ABSENT[split]] = [name for name, images in by_class if not images]
        texts[f"In fewer than {FEW_IMAGES} {split} images: {{}}."] = [
            f"{name} ({images})" for name, images in by_class if 0 < images < FEW_IMAGES
        ]
        much = [f"{counts.ignored_share:.0%}"] * (counts.ignored_share > MUCH_IGNORED)
        texts[f"{{}} of the {split} pixels are ignored or have no value."] = much
    texts["Images in training and in validation, byte for byte, which raises scores: {}."] = [
        " = ".join(dict.fromkeys(pair)) for pair in shared
    ]
    return [text.format(_some(names)) for text, names in texts.items() if names]


def notes_of_run(classes: list[str], data: dict[str, Any]) -> list[str]:
    """Return the notes about the data of a run, from `manifest.json["data"]`; none for a run that has not counted."""
    labels = {split: LabelCounts(**counts) for split, counts in data.get("labels", {}).items()}
    return data_notes(classes, labels, data.get("shared_images", []))


def format_labels(classes: list[str], labels: dict[str, LabelCounts]) -> str:
    """Return a table for the terminal: labelled pixels and images of each class, in each split."""
    from pandas import DataFrame

    columns = {}
    for split, counts in labels.items():
        columns[f"{split} pixels"] = [*counts.pixels, counts.ignored]
        columns[f"{split} images"] = [*counts.images_of_class, counts.images]
    return DataFrame(columns, [*(classes or ["value"]), "ignored"]).to_string()


def _some(names: list[str]) -> str:
    """Return names with commas, of many the first ones and how many more there are."""
    rest = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")
