"""Synthetic states for the benchmarks. Of `probes`, only what checkouts that are compared have, too, is imported."""

import math

import torch
import torch.nn.functional as F

from probes.ops.quadrature import PreparedMasks, prepare_masks

TIGHT_NODES = 5  # of the solver's loss

BATCH = 32


class Synthetic:
    """States of Gaussian classes, drawn for each batch from its number; nothing is kept.

    Shares, and how spectra fall, are about those of DINOv2-S on three data sets.
    Images are 4 x 4 objects, each of a random class.

    Args:
        images: Number of images.
        side: Tokens of a side.
        width: d.
        classes: K.
        decay: Exponent by which the variance within classes falls over the axes of their correlations; 0 makes all
            axes alike.
        image_share: Part of the variance within classes that all tokens of an image have in common.
        device: Where states are drawn; each kind of device draws others.
    """

    OBJECT_SHARE = (
        0.12  # of that variance, what the tokens of an object have in common beyond their image
    )
    DISTANCE = 0.35  # exponent by which class means come closer over the axes, in standard deviations; 1 on the first

    def __init__(
        self,
        images: int,
        side: int,
        width: int,
        classes: int,
        decay: float,
        image_share: float,
        device: str = "cpu",
    ):
        self.images = images
        self.grid = (side, side)
        self.width = width
        self.classes = classes
        self.image_share = image_share
        self.device = device
        generator = torch.Generator(device).manual_seed(0)
        axis = torch.arange(1, width + 1, device=device)
        self.deviation = axis ** (-decay / 2)
        self.means = torch.randn(classes, width, generator=generator, device=device)
        self.means *= self.deviation * axis**-self.DISTANCE
        # Channels are mixtures of axes, since the solver's units would undo a decay over channels. A product of two
        # small rotations mixes all channels, in little time.
        rows = max(i for i in range(1, math.isqrt(width) + 1) if width % i == 0)
        self.rotations = [
            torch.linalg.qr(torch.randn(size, size, generator=generator, device=device)).Q
            for size in (rows, width // rows)
        ]

    def __len__(self) -> int:
        return self.images

    def prepare(self, target: torch.Tensor) -> PreparedMasks:
        """Return masks uint8[B, H, W] with many nodes."""
        return prepare_masks(target, self.classes, self.grid, TIGHT_NODES)

    def batches(self):
        """Yield images, states, masks and targets."""
        side = self.grid[0]
        size = 8 * self.grid[0]
        for start in range(0, self.images, BATCH):
            generator = torch.Generator(self.device).manual_seed(1 + start)
            images = list(range(start, min(start + BATCH, self.images)))
            shape = (len(images), 1, 4, 4)
            objects = torch.randint(
                0, self.classes, shape, generator=generator, device=self.device
            ).float()
            tokens = F.interpolate(objects, (side, side))[:, 0].long()
            targets = F.interpolate(objects, (size, size))[:, 0].to(torch.uint8).cpu()
            states = self.means[tokens.flatten(1)] + self._noise(len(images), generator)
            masks = self.prepare(targets)
            yield (images, self._mix(states), masks.to(self.device), list(targets))

    def _noise(self, images: int, generator: torch.Generator) -> torch.Tensor:
        """Return what states differ by within classes, f32[B, T, d]: of images, of objects and of tokens."""
        shares = (self.image_share, self.OBJECT_SHARE, 1 - self.image_share - self.OBJECT_SHARE)
        noise = torch.zeros(images, self.width, *self.grid, device=self.device)
        for share, side in zip(shares, (1, 4, self.grid[0]), strict=True):
            shape = (images, self.width, side, side)
            part = torch.randn(shape, generator=generator, device=self.device)
            noise += share**0.5 * F.interpolate(part, self.grid)
        return noise.flatten(2).mT * self.deviation

    def _mix(self, states: torch.Tensor) -> torch.Tensor:
        """Return states f32[B, T, d] along the axes as channels."""
        left, right = self.rotations
        return (left @ states.unflatten(-1, (len(left), len(right))) @ right).flatten(-2)
