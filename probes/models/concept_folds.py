"""Painted patches, and how they are left out to score the probes of their concepts.

Legend: F folds, N painted patches, P photos, K concepts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

FOLDS = 5


class Paint(NamedTuple):
    """Painted patches of photos.

    Args:
        concept: i64[N], 0 .. K-1, each at least once.
        photo: i64[N], 0 .. P-1.
        patch: i64[N], number of the patch in its photo.
    """

    concept: Tensor
    photo: Tensor
    patch: Tensor


class Folds(NamedTuple):
    """How painted patches are left out.

    Args:
        of: i64[N], fold of each patch; None if a concept has one patch only, so that none can be left out.
        by_photo: True if all patches of a photo are in one fold.
    """

    of: Tensor | None
    by_photo: bool


def make_folds(paint: Paint, photo_width: int) -> Folds:
    """Leave photos out if each concept is painted on several, else blocks of patches.

    Args:
        paint: The patches.
        photo_width: Columns of the grid.
    """
    by_photo = _folds_of_photos(paint)
    if by_photo is None:
        by_block = _folds_of_blocks(paint, photo_width)
        return Folds(by_block, by_photo=False)
    return Folds(by_photo[paint.photo], by_photo=True)


def _folds_of_photos(paint: Paint) -> Tensor | None:
    """Return the fold i64[P] of each photo; None if a concept would be in no photo of the other folds."""
    photos = int(paint.photo.max()) + 1
    concepts = int(paint.concept.max()) + 1
    shown = torch.zeros(photos, concepts, dtype=torch.bool)
    shown[paint.photo, paint.concept] = True
    fold_of = torch.full((photos,), -1)
    count = min(FOLDS, photos)
    photos_of_concept = shown.sum(0)
    rarest_first = photos_of_concept.argsort(stable=True)
    # photos of the rarest concept go into different folds
    for concept in rarest_first.tolist():
        with_concept = shown[:, concept]
        unassigned = with_concept & (fold_of < 0)
        for photo in unassigned.nonzero().flatten().tolist():
            fold_of[photo] = _emptiest_fold(fold_of, with_concept, count)
    for fold in range(count):
        left = shown[fold_of != fold]
        concepts_left = left.any(0)
        if not concepts_left.all():
            return None
    return fold_of


def _emptiest_fold(fold_of: Tensor, with_concept: Tensor, count: int) -> int:
    """Return the first of the folds with the fewest photos of a concept; of several such, the fewest photos.

    Args:
        fold_of: i64[P], fold of each photo, -1 for none yet.
        with_concept: bool[P].
        count: F.
    """
    fullness = []
    for fold in range(count):
        in_fold = fold_of == fold
        of_concept = int((with_concept & in_fold).sum())
        of_all = int(in_fold.sum())
        fullness.append((of_concept, of_all))
    return fullness.index(min(fullness))


def _folds_of_blocks(paint: Paint, photo_width: int) -> Tensor | None:
    """Return the fold i64[N] of each patch: the patches of a concept, cut along their longer side.

    None if a concept has one patch only.
    """
    sizes = paint.concept.bincount()
    count = min(FOLDS, int(sizes.min()))
    if count < 2:
        return None
    fold = torch.empty_like(paint.concept)
    rows = paint.patch // photo_width
    columns = paint.patch % photo_width
    for concept, size in enumerate(sizes.tolist()):
        of_concept = paint.concept == concept
        mine = of_concept.nonzero().flatten()
        row = rows[mine]
        column = columns[mine]
        height = row.max() - row.min()
        width = column.max() - column.min()
        if width > height:
            along = column
            across = row
        else:
            along = row
            across = column
        photo = paint.photo[mine]
        place = photo * photo_width**2 * 4 + along * photo_width * 2 + across
        order = mine[place.argsort()]
        fold[order] = torch.arange(size) * count // size
    return fold
