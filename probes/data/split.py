"""From the names of photos to those of training and of validation, where a data set has no splits."""

import re
from collections import Counter
from collections.abc import Sequence
from random import Random

from llava_bidir.common.errors import UserError


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
    group_of = dict(zip(names, names, strict=True))
    if groups is not None:
        try:
            pattern = re.compile(groups)
        except re.error as error:
            raise UserError(f"--groups {groups!r} is no regular expression: {error}") from None
        group_of = {name: _group(name, pattern) for name in names}
    sizes = Counter(group_of.values())
    order = sorted(sizes)
    Random(seed).shuffle(order)
    wanted = share * len(names)
    taken = 0
    validation = set()
    for group in order:
        if taken + sizes[group] / 2 <= wanted:
            validation.add(group)
            taken += sizes[group]
    if not 0 < taken < len(names):
        raise UserError(
            f"--validation {share:g} of {len(names)} photos in {len(sizes)} groups leaves a split empty; choose "
            "another share, or --groups that make smaller ones"
        )
    training = [name for name in names if group_of[name] not in validation]
    return training, [name for name in names if group_of[name] in validation]


def _group(name: str, pattern: re.Pattern) -> str:
    match = pattern.search(name)
    if match is None:
        raise UserError(f"--groups {pattern.pattern!r} finds nothing in {name!r}")
    return match[1] if pattern.groups and match[1] is not None else match[0]
