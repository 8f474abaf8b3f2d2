"""Time and training loss of a probe: at its optimum, by the paper's AdamW, and by scikit-learn at a given strength.

`bench.py --only solver` runs it on synthetic states (`synthetic_states.py`): 48 images, 16 x 16 tokens, 384 channels,
11 classes, masks of 360 x 480 pixels. `probes.solve_features` searches the strength over four folds and ends with a
certificate; the other two are given what they need. `solver.py` compares two checkouts on states of photos.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from synthetic_states import Synthetic
from torch import Tensor, nn

import probes

IMAGES, SIDE, WIDTH, CLASSES = 48, 16, 384, 11
SIZE = (360, 480)
EPOCHS, BATCH = 20, 16  # the paper's epochs; its batch of 64 would be the whole data set
LEARNING_RATE = 1e-3
INVERSE_STRENGTH = 1.0  # of scikit-learn, whose penalty is of another kind


def synthetic_states() -> tuple[Tensor, Tensor]:
    """Return states f32[N, h, w, d] and masks uint8[N, H, W]."""
    images = Synthetic(
        IMAGES,
        SIDE,
        WIDTH,
        CLASSES,
        decay=1.0,
        image_share=0.1,
    )
    parts = list(images.batches())
    states = torch.cat([part[1] for part in parts]).unflatten(1, (SIDE, SIDE))
    masks = torch.cat([torch.stack(part[3]) for part in parts])
    return states, F.interpolate(masks[:, None].float(), SIZE)[:, 0].to(torch.uint8)


def pixel_loss(weight: Tensor, bias: Tensor, states: Tensor, masks: Tensor) -> Tensor:
    """Return the mean loss of the pixels in nats, upsampled by F.interpolate."""
    logits = F.interpolate((states @ weight.T + bias).permute(0, 3, 1, 2), SIZE, mode="bilinear")
    return F.cross_entropy(logits, masks.long())


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
            pixel_loss(head.weight, head.bias, states[part], masks[part]).backward()
            optimizer.step()
    return head.weight.detach(), head.bias.detach()


def fit_patches(states: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight and bias of scikit-learn on tokens that are labelled by the pixel in their middle."""
    rows, columns = ((torch.arange(SIDE) * 2 + 1) * size // (2 * SIDE) for size in SIZE)
    labels = masks[:, rows[:, None], columns]
    model = LogisticRegression(C=INVERSE_STRENGTH, max_iter=1000)
    model.fit(states.flatten(0, 2).numpy(), labels.flatten().numpy())
    return tuple(torch.from_numpy(np.float32(x)) for x in (model.coef_, model.intercept_))


def bench_solver(paired: Callable, rounds: int) -> list[dict]:
    """Return ratios of time; print the loss of each probe on the images that it was fitted to."""
    states, masks = synthetic_states()
    ways = {
        "probes.solve_features": solve,
        "AdamW, 20 epochs": train,
        "scikit-learn": fit_patches,
    }
    for name, way in ways.items():
        loss = pixel_loss(*way(states, masks), states, masks).item()
        print(f"  {name}: {loss:.4f} nats a pixel")
    ours = partial(solve, states, masks)
    return [
        {"name": f"a probe: {name}, over solve_features with its search of the strength"}
        | paired(ours, partial(way, states, masks), rounds)
        for name, way in ways.items()
        if way is not solve
    ]
