"""Synthetic states and masks for the benchmarks of the solver."""

import torch
import torch.nn.functional as F
from torch import Tensor

OBJECTS = 4  # along each side of an image, each of a random class
PX_PER_TOKEN = 8
# Shares of the variance within classes that the tokens of an image, and those of an object, have in common. They, and
# how spectra fall, are about those of DINOv2-S on three data sets.
SHARES = {"image": 0.1, "object": 0.12}
# exponent by which class means come closer over the axes, in standard deviations; 1 on the first
DISTANCE = 0.35


def synthetic_states(
    images: int,
    side: int,
    width: int,
    classes: int,
) -> tuple[Tensor, list[Tensor]]:
    """Return states f32[N, T, d] of Gaussian classes, and N masks uint8[H, W].

    Args:
        images: N.
        side: Tokens of a side of the square grid.
        width: d.
        classes: K.
    """
    generator = torch.Generator().manual_seed(0)

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    axis = torch.arange(1, width + 1)
    deviation = axis**-0.5
    means = new(classes, width) * deviation * axis**-DISTANCE
    shape = (images, 1, OBJECTS, OBJECTS)
    objects = torch.randint(0, classes, shape, generator=generator).float()
    tokens = F.interpolate(objects, (side, side)).flatten(1).long()
    masks = F.interpolate(objects, (PX_PER_TOKEN * side, PX_PER_TOKEN * side))[:, 0].byte()
    noise = torch.zeros(images, width, side, side)
    of_token = 1 - sum(SHARES.values())
    for share, parts in zip((*SHARES.values(), of_token), (1, OBJECTS, side), strict=True):
        noise += share**0.5 * F.interpolate(new(images, width, parts, parts), (side, side))
    states = means[tokens] + noise.flatten(2).mT * deviation
    # channels are mixtures of axes: the solver's units would undo a decay over channels
    return states @ torch.linalg.qr(new(width, width)).Q, [*masks]
