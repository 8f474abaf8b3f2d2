"""Read every image and target before a model is loaded, to find bad files in seconds instead of after GPU hours."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy import ndarray
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from llava_bidir.common.errors import UserError
from llava_bidir.common.processes import worker_options
from probes.data.image_dataset import ImageDataset, SegmentationDataset
from probes.ops.geometry import ignored_label

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


class ReadPair(NamedTuple):
    """What is known of an image and its target.

    Args:
        labels: Of this image.
        content: Digest of its pixels, whatever file has them.
        is_recoloured: Its mask has colours of other classes.
    """

    labels: LabelCounts
    content: str
    is_recoloured: bool


def read_pairs(
    dataset: ImageDataset, name: str, indices: Sequence[int], workers: int, progress: bool = True
) -> dict[int, ReadPair | str]:
    """Return what is known of each image and its target, or what is wrong with them, by index.

    Args:
        dataset: A split, whose pairs are decoded as in training.
        name: Name of the split, for the progress bar.
        indices: The pairs to read.
        workers: Processes; with 0, or for few images, the pairs are read in this process.
        progress: Show a progress bar.
    """
    read = partial(_read_pair, dataset)
    pairs = call_all(read, f"checking {name}", indices=indices, workers=workers, progress=progress)
    return dict(zip(indices, pairs, strict=True))


def _read_pair(dataset: ImageDataset, index: int) -> ReadPair:
    pair = dataset[index]
    image = pair["image"]
    target = pair["target"]
    has_classes = isinstance(dataset, SegmentationDataset)
    return ReadPair(
        count_labels(target, len(dataset.classes)),
        f"{image.size} {sha256(image.tobytes()).hexdigest()}",
        has_classes and dataset.is_recoloured(index, target),
    )


def call_all(
    function: Callable[[int], Any],
    title: str,
    indices: Sequence[int],
    workers: int,
    progress: bool = True,
) -> list[Any]:
    """Return what a function returns for each index, or the message of its UserError; see :func:`read_pairs`."""
    few = len(indices) <= 4 * BATCH_SIZE  # reading them takes less time than starting a process
    loader = DataLoader(
        _Calls(function),
        batch_size=BATCH_SIZE,
        sampler=indices,
        collate_fn=list,
        **worker_options(0 if few else workers),
        # the loader draws a seed, which must not advance the generator of the run
        generator=torch.Generator(),
    )
    batches = tqdm(loader, title, mininterval=1, disable=not progress)
    return [*chain.from_iterable(batches)]


class _Calls(Dataset):
    def __init__(self, function: Callable[[int], Any]):
        self.function = function

    def __getitem__(self, index: int) -> Any:
        try:
            return self.function(index)
        except UserError as error:
            return str(error)


def count_labels(target: ndarray, classes: int) -> LabelCounts:
    """Return the labels of one image, from its target of any task.

    Args:
        target: Of classes, as data sets have them; or floats [H, W] or [H, W, channels], NaN where there is no value.
        classes: K; 0 for targets of real numbers, whose pixels with a value are counted as one class.
    """
    if classes:
        labelled = target[target != ignored_label(target)]
        pixels = np.bincount(labelled, minlength=classes)
        return LabelCounts(
            images=1, pixels=pixels, images_of_class=pixels > 0, ignored=target.size - labelled.size
        )
    valid = np.isfinite(target).reshape(*target.shape[:2], -1).all(-1)
    return LabelCounts(
        images=1, pixels=[valid.sum()], images_of_class=[valid.any()], ignored=(~valid).sum()
    )


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


def find_remarks(pairs: Mapping[str, ReadPair]) -> dict[str, list]:
    """Return the names of images that are the same, in lists, and of those whose mask has colours of other classes.

    Args:
        pairs: What is known of each image, by SPLIT/NAME.
    """
    names_of: dict[str, list[str]] = {}
    for name, pair in pairs.items():
        names_of.setdefault(pair.content, []).append(name)
    return {
        "shared_images": [names for names in names_of.values() if len(names) > 1],
        "recoloured_masks": [name for name, pair in pairs.items() if pair.is_recoloured],
    }


def group_copies(images: ImageDataset, contents: Sequence[str]) -> None:
    """Put copies of an image into one group of a split, from the digest of the pixels of each image."""
    if len({*contents}) < len(contents):
        images.groups = join_groups(images.groups or images.names, contents)


def join_groups(groups: Sequence[str], contents: Sequence[str]) -> list[int]:
    """Return groups of images as numbers, where those that have an image of the same content are one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    images = len(groups)
    _, group = np.unique(groups, return_inverse=True)
    _, content = np.unique(contents, return_inverse=True)
    edges = coo_array((np.ones(images), (group, images + content)), (2 * images, 2 * images))
    _, number = connected_components(edges, directed=False)
    return number[group].tolist()


def data_notes(
    classes: list[str], labels: Mapping[str, LabelCounts], remarks: Mapping[str, Any]
) -> list[str]:
    """Return what a reader of scores must know about the data, after the files were checked.

    Args:
        classes: Names of the classes.
        labels: Labels by split; none if they were not counted.
        remarks: Of :func:`find_remarks`.
    """
    texts: dict[str, list[str]] = {}  # the names that a note is about, by note
    for split, counts in labels.items():
        by_class = list(zip(classes, counts.images_of_class, strict=False))
        texts[ABSENT[split]] = [name for name, images in by_class if not images]
        texts[f"In fewer than {FEW_IMAGES} {split} images: {{}}."] = [
            f"{name} ({images})" for name, images in by_class if 0 < images < FEW_IMAGES
        ]
        ignored = counts.ignored / (counts.ignored + sum(counts.pixels))
        much = [f"{ignored:.0%}"] * (ignored > MUCH_IGNORED)
        texts[f"{{}} of the {split} pixels are ignored or have no value."] = much
    texts[
        "The same pixels in several images; they share folds and resamplings, and across splits raise scores: {}."
    ] = [" = ".join(names) for names in remarks.get("shared_images", ())]
    recoloured = remarks.get("recoloured_masks")
    texts[
        "Masks whose labels have the colours of other classes; the labels count, check them: {}."
    ] = recoloured
    return [text.format(_some(names)) for text, names in texts.items() if names]


def notes_of_run(classes: list[str], data: dict[str, Any]) -> list[str]:
    """Return the notes about the data of a run, from `manifest.json["data"]`; none for a run that has not counted."""
    labels = {split: LabelCounts(**counts) for split, counts in data.get("labels", {}).items()}
    return data_notes(classes, labels, data)


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
    text = ", ".join(names[:MOST_NAMES])
    if rest > 0:
        text += f" and {rest} more"
    return text
