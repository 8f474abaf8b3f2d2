"""Read every image and target before a model is loaded, to find bad files in seconds instead of after GPU hours."""

from collections.abc import Iterable, Mapping, Sequence
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
FILES_PER_KIND = 3  # in the error message
UNLABELLED = "no labelled pixel in any target of the split"
FEW_IMAGES = 5  # a class in fewer images has an IoU of single images
MUCH_IGNORED = 1 / 3
MOST_NAMES = 8  # in a message


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


class BadPair(NamedTuple):
    """An image and its target that cannot be used: the kind of defect, and what is wrong with which file."""

    kind: str
    message: str


class _Pairs(Dataset):
    """The labels of each pair, None if it cannot be read, and its defect; pairs are decoded as in training."""

    def __init__(self, dataset: ImageDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[LabelCounts | None, BadPair | None]:
        try:
            target = self.dataset[index]["target"]
        except UserError as error:
            return None, BadPair(getattr(error, "kind", "unusable"), str(error))
        labels = count_labels(target, len(self.dataset.classes))
        file = self.dataset.files[index][-1]
        problem = None
        if self.dataset.classes and not sum(labels.pixels):
            problem = f"{file}: all pixels are ignored; check which labels are"
        elif self.dataset.task == "boundaries" and not labels.pixels[1]:
            problem = f"{file}: no pixel is a boundary; where objects have an ignored border, as in VOC, none can be"
        return labels, BadPair(UNLABELLED, problem) if problem else None


def read_pairs(
    dataset: ImageDataset,
    name: str,
    indices: Iterable[int],
    workers: int,
    progress: bool = True,
) -> tuple[LabelCounts, list[BadPair]]:
    """Return the labels of images, and the pairs that cannot be used, also those without a labelled pixel.

    Args:
        dataset: A split.
        name: Name of the split, for the progress bar.
        indices: The pairs to read.
        workers: Processes; with 0, or for few images, the pairs are read in this process.
        progress: Show a progress bar.
    """
    indices = list(indices)
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
    counts = [LabelCounts(0, zero, zero, 0)]
    bad: list[BadPair] = []
    with tqdm(
        total=len(indices),
        desc=f"checking {name}",
        unit=" images",
        mininterval=1,
        disable=not progress,
    ) as bar:
        for pairs in loader:
            bar.update(len(pairs))
            counts += [labels for labels, _ in pairs if labels]
            bad += [defect for _, defect in pairs if defect]
    return join_counts(counts), bad


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


def check_pairs(bad: Mapping[str, Sequence[BadPair]], images: Mapping[str, int]) -> None:
    """Raise a UserError if some pairs cannot be used; some without a labelled pixel can, all of a split cannot.

    Args:
        bad: The bad pairs by split.
        images: Number of images by split.
    """
    by_kind: dict[str, list[str]] = {}
    for split, pairs in bad.items():
        unlabelled = sum(pair.kind == UNLABELLED for pair in pairs)
        for kind, message in pairs:
            if kind != UNLABELLED or unlabelled == images[split]:
                by_kind.setdefault(kind, []).append(message)
    if not by_kind:
        return
    total = sum(map(len, by_kind.values()))
    lines = [f"{total} of {sum(images.values())} images cannot be used:"]
    for kind, messages in by_kind.items():
        lines.append(f"  {len(messages)} x {kind}")
        lines += [f"    {message}" for message in sorted(messages)[:FILES_PER_KIND]]
        if len(messages) > FILES_PER_KIND:
            lines.append(f"    ... and {len(messages) - FILES_PER_KIND} more")
    raise UserError("\n".join(lines))


def check_labels(classes: list[str], training: LabelCounts, own_classes: bool) -> None:
    """Raise if training images do not have the labels of the classes that probes are to tell apart.

    Classes that are published with a layout can be absent from a part of it, and so can any class from fewer than
    `FEW_IMAGES` images per class; :func:`data_notes` says so.

    Args:
        classes: Names of the classes.
        training: Labels of the training images.
        own_classes: The names are those of this data set, in its classes.json.

    Raises:
        UserError: One class is labelled at most, or a class of classes.json never is.
    """
    present = [name for name, pixels in zip(classes, training.pixels, strict=True) if pixels]
    absent = [name for name in classes if name not in present]
    if len(present) < 2:
        what = f"of the class {present[0]!r}" if present else "ignored"
        raise UserError(
            f"all labelled training pixels are {what}, so that a probe is right everywhere; check the labels of the "
            f"masks, and which are ignored ({len(classes)} classes are listed: {_some(classes)})"
        )
    if absent and own_classes and training.images >= FEW_IMAGES * len(classes):
        raise UserError(
            f"no pixel of {training.images:,} training masks is labelled {_some(absent)}, which classes.json lists; "
            "check the labels of the masks. If the data have no such class, ignore its label: "
            '"ignore_index": [LABEL, 255]'
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
    if labels:
        training, validation = labels["training"], labels["validation"]
        rows = list(
            zip(classes, training.images_of_class, validation.images_of_class, strict=False)
        )
        of_kind = {  # by whether training and validation images have the class
            (False, True): "No training pixel is labelled {}, so that the IoU there is 0.",
            (
                True,
                False,
            ): "No validation pixel is labelled {}: the IoU there is 0 at sites whose probe predicts it, "
            "and left out of mIoU at others, so that these are not of the same classes. Ignore its label.",
            (False, False): "No pixel of either split is labelled {}.",
        }
        for kind, text in of_kind.items():
            texts[text] = [name for name, *images in rows if tuple(map(bool, images)) == kind]
        for split, counts in labels.items():
            few = zip(classes, counts.images_of_class, strict=False)
            texts[f"In fewer than {FEW_IMAGES} {split} images: {{}}."] = [
                f"{name} ({images})" for name, images in few if 0 < images < FEW_IMAGES
            ]
            much = [f"{counts.ignored_share:.0%}"] * (counts.ignored_share > MUCH_IGNORED)
            texts[f"{{}} of the {split} pixels are ignored or have no value."] = much
    verb = "image stands" if len(shared) == 1 else "images stand"
    texts[
        f"{len(shared)} {verb} in training and in validation, byte for byte, which raises scores: {{}}."
    ] = [" = ".join(dict.fromkeys(pair)) for pair in shared]
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
        share = f"{counts.ignored_share:.1%}"
        columns[f"{split} pixels"] = [*map("{:,}".format, counts.pixels), share]
        columns[f"{split} images"] = [*map("{:,}".format, counts.images_of_class), ""]
    rows = [*classes, "ignored"] if classes else ["value", "no value"]
    return DataFrame(columns, rows).to_string()


def _some(names: list[str]) -> str:
    """Return names with commas, of many the first ones and how many more there are."""
    rest = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")
