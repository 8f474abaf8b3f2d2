"""Which pixels choose the strength: those of the images that a fold leaves out, but for classes that it alone has.

The probe that is tested on a fold has never seen such a class. Its bias falls for as long as the solver goes on, so
what the pixels of the class lose is chance, and says nothing about a strength.

Legend: F folds, B images, K classes, h w token grid.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llava_bidir.common.errors import UserError
from probes.ops.geometry import ignore_index_of
from probes.ops.quadrature import PreparedMasks, join_masks


def lone_classes(masks: PreparedMasks, fold_of: Tensor) -> Tensor:
    """Return the classes that each fold alone has, bool[F, K]; none if there is one fold, which nothing is left out of.

    Args:
        masks: B masks.
        fold_of: i64[B], fold of each image.

    Raises:
        UserError: No class is in two folds, so that no fold can test the probe of the others.
    """
    in_image = masks.soft.sum((2, 3)) > 0  # bool[B, K]
    fold_of_image = fold_of.to(in_image.device)
    folds = int(fold_of.max()) + 1
    in_fold = torch.stack([in_image[fold_of_image == fold].any(0) for fold in range(folds)])
    if folds == 1:
        return torch.zeros_like(in_fold)
    lone = in_fold & (in_fold.sum(0) == 1)
    if in_fold.any() and torch.equal(lone, in_fold):
        raise UserError(
            f"each class is labelled in only one of {folds} folds of the training images, so that no fold can "
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
        target_of: Returns mask i, uint8[H, W].
        prepare: Prepares masks uint8[1, H, W], as those of `masks` were.
    """
    device = masks.soft.device
    in_image = masks.soft.sum((2, 3)) > 0  # bool[B, K]
    lone_in_fold = lone_classes(masks, fold_of)
    ignored = lone_in_fold[fold_of.to(device)] & in_image
    changed = {}
    for image in ignored.any(1).nonzero().flatten().tolist():
        target = target_of(image).cpu()
        classes = ignored[image].nonzero().flatten().cpu()
        is_lone = torch.isin(target, classes)
        without_lone = target.masked_fill(is_lone, ignore_index_of(masks.soft.shape[1]))
        changed[image] = prepare(without_lone[None]).to(device)
    if not changed:
        return None
    parts = (changed.get(image, masks[image : image + 1]) for image in range(len(masks)))
    return join_masks(parts, len(masks))
