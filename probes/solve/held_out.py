"""Which pixels choose the strength: those of the images that a fold leaves out, but for classes that it alone has.

The probe that is tested on a fold has never seen such a class. Its bias falls for as long as the solver goes on, so
what the pixels of the class lose is chance, and says nothing about a strength.

Legend: F folds, B images, K classes, h w token grid.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llava_bidir.common.errors import UserError
from probes.data.base import IGNORE_INDEX
from probes.ops.quadrature import PreparedMasks, join_masks


def class_pixels(masks: PreparedMasks, fold_of: Tensor, folds: int) -> Tensor:
    """Return the labelled pixels of each class in each fold, f64[F, K].

    Args:
        masks: B masks.
        fold_of: i64[B], fold of each image.
        folds: F.
    """
    by_image = masks.soft.sum((2, 3), dtype=torch.float64)
    by_fold = by_image.new_zeros(folds, by_image.shape[1])
    return by_fold.index_add_(0, fold_of.to(by_image.device), by_image)


def lone_classes(pixels: Tensor) -> Tensor:
    """Return the classes that each fold alone has, bool[F, K]; none if there is one fold, which nothing is left out of.

    Args:
        pixels: f64[F, K], labelled pixels of each class in each fold.

    Raises:
        UserError: No class is in two folds, so that no fold can test the probe of the others.
    """
    has = pixels > 0
    if len(pixels) == 1:
        return torch.zeros_like(has)
    lone = has & (has.sum(0) == 1)
    if has.any() and torch.equal(lone, has):
        raise UserError(
            f"each class is labelled in only one of {len(pixels)} folds of the training images, so that no fold can "
            "test the probe of the others; expected more images of each class"
        )
    return lone


def scored_masks(
    masks: PreparedMasks,
    fold_of: Tensor,
    target_of: Callable[[int], Tensor],
    prepare: Callable[[Tensor], PreparedMasks],
) -> PreparedMasks | None:
    """Return the masks of all images by which folds are tested; None if each class is in two folds.

    Args:
        masks: Of all images.
        fold_of: i64[B], fold of each image.
        target_of, prepare: As of :func:`ignore_classes`.
    """
    folds = int(fold_of.max()) + 1
    lone = lone_classes(class_pixels(masks, fold_of, folds))
    if not lone.any():
        return None
    return ignore_classes(masks, lone.cpu()[fold_of], target_of, prepare)


def ignore_classes(
    masks: PreparedMasks,
    ignored: Tensor,
    target_of: Callable[[int], Tensor],
    prepare: Callable[[Tensor], PreparedMasks],
) -> PreparedMasks:
    """Return masks without the pixels of some classes.

    Args:
        masks: B masks.
        ignored: bool[B, K], the classes for each mask.
        target_of: Returns mask i, uint8[H, W].
        prepare: Prepares masks uint8[1, H, W], as those of `masks` were.
    """
    device = masks.soft.device
    ignored = ignored.to(device) & (masks.soft.sum((2, 3)) > 0)
    images = ignored.any(1).nonzero().flatten().tolist()
    if not images:
        return masks
    changed = []
    for image in images:
        target = target_of(image).cpu()
        classes = ignored[image].nonzero().flatten().cpu()
        changed.append(prepare(target.masked_fill(torch.isin(target, classes), IGNORE_INDEX)[None]))
    both = join_masks([masks, join_masks(changed).to(device)])
    place = {image: len(masks) + i for i, image in enumerate(images)}
    return both[[place.get(image, image) for image in range(len(masks))]]
