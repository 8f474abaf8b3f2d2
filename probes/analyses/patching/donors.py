"""Where patched states come from: the same weights under another mask, or a picture that differs in one cue.

    mask    The picture and the weights are the same; the donor runs under another mask among image tokens. Sets: "all"
            tokens; the "first_row", "middle_row" and "last_row" of the grid; "class", the tokens of the class with the
            most patches in the image.
    pairs   The picture lacks a cue that the donor's picture has; elsewhere both have the same pixels. Set: "cue", the
            tokens whose pixels differ.

Two checkpoints that were trained separately have no common basis of states, so neither can be the other's donor.

Shapes: B images, T image tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llava_bidir.common.errors import UserError
from probes.data.base import IGNORE_INDEX
from probes.data.folder import FolderDataset
from probes.evaluation.true_classes import true_classes
from probes.models.frozen_mllm import FrozenMLLM

ROWS = ("first_row", "middle_row", "last_row")


class Batch(NamedTuple):
    """Pictures whose states are replaced, and where the new states come from."""

    index: list[int]
    pixels: Tensor  # f[B, 3, H, W], of the forward that is patched
    donor_pixels: Tensor  # f[B, 3, H, W]
    truth: Tensor  # long[B, T], class of most labelled pixels of each patch, -1 if unlabelled
    sets: dict[str, Tensor]  # bool[B, T], tokens by the name of their set


def mask_batch(
    mllm: FrozenMLLM,
    dataset,
    index: list[int],
    classes: int,
) -> Batch:
    """Return images of a split with the sets of tokens that receive states of another mask."""
    samples = [dataset[i] for i in index]
    pixels = mllm.preprocess([sample["image"] for sample in samples])
    truth = _truth(mllm, samples, classes)
    rows, columns = mllm.grid
    row_of = torch.arange(rows * columns) // columns
    sets = {"all": torch.ones_like(truth, dtype=torch.bool)}
    sets |= {
        name: (row_of == row).expand_as(truth)
        for name, row in zip(ROWS, (0, rows // 2, rows - 1), strict=True)
    }
    patches = F.one_hot(truth + 1, classes + 1).sum(1)[:, 1:]
    largest = patches.argmax(1, keepdim=True)
    return Batch(
        index,
        pixels,
        pixels,
        truth,
        sets | {"class": truth == largest},
    )


def pair_batch(
    mllm: FrozenMLLM,
    pairs: "Pairs",
    index: list[int],
    classes: int,
) -> Batch:
    """Return pictures without a cue, their pairs with it as donors, and the tokens under the pixels that differ."""
    without = [pairs.without[i] for i in index]
    cued = [pairs.cued[i] for i in index]
    pixels = mllm.preprocess([sample["image"] for sample in without])
    donor = mllm.preprocess([sample["image"] for sample in cued])
    for one, other in zip(without, cued, strict=True):
        if one["image"].size != other["image"].size:
            raise UserError(
                f"the pictures with and without {one['name']} differ in size; expected the same pixels"
            )
    cue_pixels = []
    for one, other in zip(without, cued, strict=True):
        differs = (np.asarray(one["image"]) != np.asarray(other["image"])).any(-1)
        cue_pixels.append(torch.where(torch.from_numpy(differs), 0, IGNORE_INDEX).byte())
    cue = true_classes(cue_pixels, 1, mllm) == 0
    for sample, covered in zip(cued, cue.all(1).tolist(), strict=True):
        if covered:
            raise UserError(
                f"the pictures with and without {sample['name']} differ in all patches; expected a cue in some, and "
                "equal pixels elsewhere (JPEG changes them all: use PNG)"
            )
    return Batch(
        index,
        pixels,
        donor,
        _truth(mllm, cued, classes),
        {"cue": cue},
    )


def _truth(mllm: FrozenMLLM, samples: Sequence[dict], classes: int) -> Tensor:
    targets = [torch.from_numpy(sample["target"]) for sample in samples]
    return true_classes(targets, classes, mllm)


class Pairs:
    """Pictures with and without a cue: a folder data set with the splits "with" and "without" and the same names.

    Args:
        root: The folder, as `probes demo-assets` writes it to OUT/pairs.
        classes: Names of the classes of the probes.

    Raises:
        UserError: The files are not those of a folder data set, a pair is not complete, or the classes are others.
    """

    def __init__(self, root: Path, classes: Sequence[str]):
        self.cued = FolderDataset(root, "with")
        self.without = FolderDataset(root, "without")
        if odd := sorted(set(self.cued.names) ^ set(self.without.names)):
            raise UserError(
                f"{root}: {odd[0]} is in one of images/with and images/without; expected pairs"
            )
        if self.cued.classes != list(classes):
            raise UserError(
                f"{root / 'classes.json'}: the classes are not those of the probes, {', '.join(classes)}"
            )

    def __len__(self) -> int:
        return len(self.cued)

    def identity(self) -> dict[str, str]:
        """Return what the pairs are, by content."""
        of_cued = {f"with_{key}": value for key, value in self.cued.identity().items()}
        of_others = {f"without_{key}": value for key, value in self.without.identity().items()}
        return of_cued | of_others
