"""From what a source says of a photo to classes: which are kept, what is on top, what counts nowhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from llava_bidir.common.errors import UsageError, UserError, did_you_mean
from probes.config import MasksOptions

from .source import IGNORED, UNLABELLED, ClassName, LabelMap, Region, Size


class Composed(NamedTuple):
    """Classes of a photo.

    Args:
        classes: i32[H, W], numbers of classes, or IGNORED.
        unlabelled: Pixels that no annotation has.
        overlapping: Pixels that regions of two classes claim.
    """

    classes: ndarray
    unlabelled: int
    overlapping: int


@dataclass(frozen=True)
class MaskRules:
    """How annotations become classes.

    Args:
        names: Names of the classes.
        class_of: Number of the class of each name in a source; other names are dropped.
        unlabelled: Number of the class of pixels without an annotation, or IGNORED.
        overlap: What two regions share: of the smaller one (of equal ones the later), of the later one, or ignored.
        crowd: Whether a crowd is ignored, or of its class.
    """

    names: list[str]
    class_of: dict[ClassName, int]
    unlabelled: int
    overlap: str
    crowd: str

    @classmethod
    def of(cls, options: MasksOptions, names: Sequence[str]) -> "MaskRules":
        """Return the rules of a command about classes with these names.

        Raises:
            UsageError: A class that is to be kept is none.
            UserError: There are fewer than two.
        """
        renamed = _kept_classes(words_of_classes(options), names)
        kept = list(dict.fromkeys(renamed.values()))
        unlabelled = IGNORED
        if options.unlabelled not in (None, "ignore"):
            if options.unlabelled not in kept:
                kept.insert(0, options.unlabelled)
            unlabelled = kept.index(options.unlabelled)
        if len(kept) < 2:
            raise UserError(
                f"a probe tells classes apart, and there is only {kept}; --unlabelled background makes one of the "
                "pixels that no annotation has"
            )
        class_of = {name: kept.index(new) for name, new in renamed.items()} | {IGNORED: IGNORED}
        return cls(kept, class_of, unlabelled, overlap=options.overlap, crowd=options.crowd)

    def compose(self, annotation: LabelMap | list[Region], size: Size) -> Composed:
        """Return the classes of a photo from its annotation, and its width and height."""
        overlapping = 0
        if isinstance(annotation, LabelMap):
            classes = [self.class_of.get(name, UNLABELLED) for name in annotation.names]
            target = np.array(classes, np.int32)[annotation.numbers]
        else:
            target, overlapping = self._stack(annotation, size)
        is_unlabelled = target == UNLABELLED
        target = np.where(is_unlabelled, self.unlabelled, target)
        return Composed(target, np.count_nonzero(is_unlabelled), overlapping)

    def _stack(self, regions: list[Region], size: Size) -> tuple[ndarray, int]:
        """Return the classes of regions, i32[H, W], and the number of pixels that two classes claim."""
        # down the columns, as pycocotools' masks
        target = np.full(size[0] * size[1], UNLABELLED, np.int32)
        claimed = target.copy()  # by objects, also below a crowd
        is_shared = np.zeros(target.shape, bool)
        drawn = [(np.flatnonzero(region.mask.T), region) for region in regions]
        if self.overlap == "smaller":  # by pixels: JSON's area can be that of another mask
            drawn.sort(key=lambda pair: -len(pair[0]))
        for pixels, region in drawn:
            if region.name not in self.class_of:  # dropped
                continue
            number = self.class_of[region.name]
            if region.is_crowd and self.crowd == "ignore":
                target[pixels] = IGNORED
                continue
            below = claimed[pixels]
            is_shared[pixels] |= (below != UNLABELLED) & (below != number)
            claimed[pixels] = target[pixels] = number
        if self.overlap == "ignore":
            target[is_shared] = IGNORED
        return target.reshape(size).T, np.count_nonzero(is_shared)


def words_of_classes(options: MasksOptions) -> list[str]:
    """Return the classes that --classes chooses: NAME or NEW=NAME; [] for all."""
    return [word for word in options.classes if not word.endswith(".json")]


def _kept_classes(chosen: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Return the new name of each class that is kept, by its name: of NAME itself, of NEW=NAME NEW."""
    if not chosen:
        return {name: name for name in names}
    parts = []
    for word in chosen:  # names of ADE20K have commas
        parts += [word] if word in names else word.split(",")
    kept = {}
    for part in parts:
        new, _, name = part.rpartition("=")
        if name not in names:
            raise UsageError(f"--classes: there is no class {name!r}{did_you_mean(name, names)}")
        kept[name] = new or name
    return kept
