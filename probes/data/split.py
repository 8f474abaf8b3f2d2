"""From photos without splits to those of training and of validation: a share, of whole groups, drawn by a seed."""

import re
from collections import Counter
from collections.abc import Sequence
from random import Random

from llava_bidir.common.errors import UserError

from .image_dataset import ImageDataset


def split_names(
    names: Sequence[str], share: float, seed: int = 0, groups: str | None = None
) -> tuple[list[str], list[str]]:
    """Return the names of training and of validation, each in the order of `names`.

    Args:
        names: Names of photos.
        share: Share of validation, above 0 and below 1; groups are whole, so that it is met as nearly as they allow.
        seed: Of the order in which groups are drawn.
        groups: Regular expression; photos of which it finds the same text (that of its first group, if it has one)
            stay together, as frames of a video must. None: each photo is a group.

    Raises:
        UserError: The expression is none, or is not found in a name, or a split would be empty.
    """
    group_of = groups_of_names(names, groups)
    sizes = Counter(group_of.values())
    order = sorted(sizes)
    Random(seed).shuffle(order)
    wanted = share * len(names)
    taken = 0
    validation = set()
    for group in order:
        if taken + sizes[group] / 2 <= wanted and taken + sizes[group] < len(names):
            validation.add(group)
            taken += sizes[group]
    if not 0 < taken < len(names):
        raise UserError(
            f"--validation {share:g} of {len(names)} photos in {len(sizes)} groups leaves a split empty; choose "
            "another share, or --groups that make smaller ones"
        )
    training = [name for name in names if group_of[name] not in validation]
    return training, [name for name in names if group_of[name] in validation]


def groups_of_names(names: Sequence[str], groups: str | None) -> dict[str, str]:
    """Return the group of each photo, see :func:`split_names`.

    Raises:
        UserError: The expression is none, or is not found in a name.
    """
    if groups is None:
        return dict(zip(names, names, strict=True))
    try:
        pattern = re.compile(groups)
    except re.error as error:
        raise UserError(f"--groups {groups!r} is no regular expression: {error}") from None
    return {name: _group(name, pattern) for name in names}


def _group(name: str, pattern: re.Pattern) -> str:
    match = pattern.search(name)
    if match is None:
        raise UserError(f"--groups {pattern.pattern!r} finds nothing in {name!r}")
    return match[1] if pattern.groups and match[1] is not None else match[0]


def keep_split(
    dataset: ImageDataset, split: str, validation: float, groups: str | None, seed: int
) -> ImageDataset:
    """Return a dataset of all photos with those of a split only; no file is moved.

    Photos of one group are also resampled together, and share a fold.

    Args:
        dataset: All photos.
        split: "training" or "validation".
        validation: Share of validation.
        groups: As of :func:`split_names`.
        seed: Of the draw.

    Raises:
        UserError: As of :func:`split_names`.
    """
    training, held_out = split_names(dataset.names, validation, seed, groups)
    names = held_out if split == "validation" else training
    file_of = dict(zip(dataset.names, dataset.files, strict=True))
    dataset.names = names
    dataset.files = [file_of[name] for name in names]
    if groups is not None:
        group_of = groups_of_names(names, groups)
        dataset.groups = [group_of[name] for name in names]
    return dataset


def note_of_series(names: Sequence[str]) -> str:
    """Return a warning where names differ only in a number, as those of a video's frames do; "" for others."""
    series: dict[str, list[str]] = {}
    for name in names:
        series.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    first, *others = max(series.values(), key=len)
    if not others:
        return ""
    return (
        f"{first} and {len(others)} more photos differ only in a number: if they are frames of a video, or views of "
        "one place, similar photos are in both splits and scores are too high; --groups REGEX keeps photos together in "
        "whose names it finds the same text"
    )
