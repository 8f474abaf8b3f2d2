"""Encoders with planted differences: `plain`, the same with rotated states, and one that cannot tell road from tree.

A photo has rectangles whose colours are drawn around those of their classes. States are linear in the colour of a
patch, then changed by two layers. `merged` leaves out the direction in which the means of road and tree differ, before
its first layer: what is left has the same distribution for both.

Shapes: B photos, T patches, d width.
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import probes

COLOURS = {
    "sky": (120, 150, 205),
    "road": (105, 100, 110),
    "tree": (85, 140, 95),
    "car": (175, 90, 95),
}
CLASSES = list(COLOURS)
MERGED = ("road", "tree")
SPREAD = 22.0  # of a rectangle's colour, so that classes overlap
WIDTH = 8
PATCH_PX = 8
SIDE_PX = 64


def write_photos(root: Path) -> Path:
    """Write a folder dataset of rectangles."""
    rng = np.random.default_rng(0)
    means = np.array(list(COLOURS.values()))
    for split, count in (("training", 24), ("validation", 40)):
        folders = [root / kind / split for kind in ("images", "annotations")]
        for folder in folders:
            folder.mkdir(parents=True)
        for i in range(count):
            mask = np.zeros((SIDE_PX, SIDE_PX), np.uint8)
            image = np.zeros((SIDE_PX, SIDE_PX, 3))
            for number in range(12):
                top = left = 0
                height = width = SIDE_PX
                if number:
                    top, left = rng.integers(0, SIDE_PX - 16, 2)
                    height, width = rng.integers(16, 40, 2)
                place = slice(top, top + height), slice(left, left + width)
                mask[place] = label = rng.integers(len(CLASSES))
                image[place] = rng.normal(means[label], SPREAD)
            image += rng.normal(0, 5, image.shape)
            for folder, pixels in zip(folders, (image.clip(0, 255), mask), strict=True):
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03d}.png")
    (root / "classes.json").write_text(json.dumps({"classes": CLASSES}))
    return root


class Layer(nn.Module):
    """A layer of rotated states: what it does to them is what it would do before the rotation."""

    def __init__(self, rotation: Tensor):
        super().__init__()
        self.rotation = nn.Parameter(rotation)
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, states: Tensor) -> Tensor:
        """Return the states f[B, T, d]."""
        before = states @ self.rotation
        added = self.mlp(before).tanh()
        return states + added @ self.rotation.T


class Encoder(nn.Module):
    """Patches as their colours, merged or not, rotated or not, then two layers."""

    def __init__(self, merges: bool = False, rotates: bool = False):
        super().__init__()
        torch.manual_seed(0)
        colours = torch.randn(WIDTH, 3)
        self.layers = nn.ModuleList([Layer(torch.eye(WIDTH)) for _ in range(2)])
        rotation = torch.eye(WIDTH)
        if rotates:
            rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q
        for layer in self.layers:
            layer.rotation.data = rotation
        if merges:
            road, tree = (torch.tensor(COLOURS[name]).float() for name in MERGED)
            axis = nn.functional.normalize(colours @ (road - tree), dim=0)
            colours = colours - torch.outer(axis, axis @ colours)
        self.stem = nn.Conv2d(3, WIDTH, PATCH_PX, PATCH_PX, bias=False)
        mean = (rotation @ colours) / PATCH_PX**2  # of the pixels of a patch
        self.stem.weight.data = mean[..., None, None].repeat(1, 1, PATCH_PX, PATCH_PX)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the states f[B, T, d] of the last layer."""
        states = self.stem(pixels).flatten(2).transpose(1, 2)
        for layer in self.layers:
            states = layer(states)
        return states


def describe(encoder: Encoder) -> probes.EncoderModule:
    """Return an encoder as `probes` reads it."""
    return probes.EncoderModule(
        encoder,
        preprocess=([0.5] * 3, [0.25] * 3),
        patch=PATCH_PX,
        layers="layers",
        image_px=SIDE_PX,
    )


def plain() -> probes.EncoderModule:
    """Return an encoder that tells all classes."""
    return describe(Encoder())


def rotated() -> probes.EncoderModule:
    """Return the same encoder, whose states at each site are those of `plain` times one rotation."""
    return describe(Encoder(rotates=True))


def merged() -> probes.EncoderModule:
    """Return one that cannot tell road from tree."""
    return describe(Encoder(merges=True))
