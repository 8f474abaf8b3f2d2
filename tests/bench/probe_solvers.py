"""Time and training loss of a probe at its optimum and by the paper's AdamW; `bench.py --only solver` runs it.

On synthetic states: 48 images, 16 x 16 tokens, 384 channels, 11 classes, masks of 360 x 480 pixels.
`probes.solve_features` searches the strength over four folds and ends with a certificate; AdamW is given a learning
rate.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import probes

IMAGES, SIDE, WIDTH, CLASSES = 48, 16, 384, 11
SIZE = (360, 480)
OBJECTS = 4  # along each side of an image, each of a random class
# Shares of the variance within classes that the tokens of an image, and those of an object, have in common. They, and
# how spectra fall, are about those of DINOv2-S on three data sets.
OF_IMAGE, OF_OBJECT = 0.1, 0.12
# exponent by which class means come closer over the axes, in standard deviations; 1 on the first
DISTANCE = 0.35
EPOCHS, BATCH = 20, 16  # the paper's epochs; its batch of 64 would be the whole data set
LEARNING_RATE = 1e-3


def synthetic_states() -> tuple[Tensor, Tensor]:
    """Return states f32[N, h, w, d] of Gaussian classes, and masks uint8[N, H, W]."""
    generator = torch.Generator().manual_seed(0)

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def grid_of(parts: Tensor) -> Tensor:
        return F.interpolate(parts, (SIDE, SIDE))

    axis = torch.arange(1, WIDTH + 1)
    deviation = axis**-0.5
    means = new(CLASSES, WIDTH) * deviation * axis**-DISTANCE
    shape = (IMAGES, 1, OBJECTS, OBJECTS)
    objects = torch.randint(0, CLASSES, shape, generator=generator).float()
    noise = torch.zeros(IMAGES, WIDTH, SIDE, SIDE)
    shares = (OF_IMAGE, OF_OBJECT, 1 - OF_IMAGE - OF_OBJECT)
    for share, parts in zip(shares, (1, OBJECTS, SIDE), strict=True):
        noise += share**0.5 * grid_of(new(IMAGES, WIDTH, parts, parts))
    states = means[grid_of(objects)[:, 0].long()] + noise.permute(0, 2, 3, 1) * deviation
    # channels are mixtures of axes: the solver's units would undo a decay over channels
    return states @ torch.linalg.qr(new(WIDTH, WIDTH)).Q, F.interpolate(objects, SIZE)[:, 0].byte()


def pixel_loss(weight: Tensor, bias: Tensor, states: Tensor, masks: Tensor) -> Tensor:
    """Return the mean loss of the pixels in nats, upsampled by F.interpolate."""
    logits = (states @ weight.T + bias).permute(0, 3, 1, 2)
    return F.cross_entropy(F.interpolate(logits, SIZE, mode="bilinear"), masks.long())


def solve(states: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight and bias at the optimum, at the strength that four folds choose."""
    probe = probes.solve_features(states, list(masks), CLASSES)
    return probe.weight, probe.bias


def train(states: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight and bias after the paper's epochs of AdamW on full-resolution logits."""
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, CLASSES)
    optimizer = torch.optim.AdamW(head.parameters(), LEARNING_RATE)
    for _ in range(EPOCHS):
        for part in torch.randperm(IMAGES).split(BATCH):
            optimizer.zero_grad()
            pixel_loss(
                head.weight, bias=head.bias, states=states[part], masks=masks[part]
            ).backward()
            optimizer.step()
    return head.weight.detach(), head.bias.detach()


def bench_solver(paired: Callable, rounds: int) -> list[dict]:
    """Return the ratio of times; print the loss of each probe on the images that it was fitted to."""
    data = synthetic_states()
    for way in (solve, train):
        print(f"  {way.__name__}: {pixel_loss(*way(*data), *data).item():.4f} nats a pixel")
    entry = {"name": "a probe: AdamW for 20 epochs, over solve_features with its search"}
    return [entry | paired(partial(solve, *data), partial(train, *data), rounds)]
