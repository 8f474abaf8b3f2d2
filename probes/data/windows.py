"""Training images as a model sees them: squares, or windows of photos that each are an image of their own.

The loss of a probe is that of each square by itself. Logits are averaged over windows where a photo is predicted only,
as in published protocols, whose training sees crops.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from llava_bidir.common.images import read_image
from probes.ops.geometry import SLIDE, Geometry

from .image_dataset import ImageDataset

if TYPE_CHECKING:
    from probes.models.frozen_mllm import FrozenMLLM


class TrainingSamples(Dataset):
    """Photos with one square each: samples are those of the data set.

    Args:
        photos: The data set.
        mllm: The model, which preprocesses images.

    Attributes:
        photo_of: i64[N], photo of each sample.
        geometry: Position of the tokens on the target of a sample.
    """

    def __init__(self, photos: ImageDataset, mllm: "FrozenMLLM"):
        self.photos = photos
        self.mllm = mllm
        self.geometry: Geometry = mllm.geometry
        self.photo_of: Tensor = torch.arange(len(photos))

    def __len__(self) -> int:
        return len(self.photo_of)

    def __getitem__(self, index: int) -> dict:
        return self.photos[index]

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the pixels f[B, 3, H, W] of images of samples."""
        return self.mllm.preprocess(images)


class PieceSamples(TrainingSamples):
    """Pieces of photos, cut to the side of a window, which are not resized any more."""

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the pixels f[B, 3, H, W] of pieces."""
        return self.mllm.normalise(images)


class WindowSamples(PieceSamples):
    """The windows of all photos: each with the pixels of the mask that it is nearest to, in the mask's own size."""

    def __init__(self, photos: ImageDataset, mllm: "FrozenMLLM"):
        super().__init__(photos, mllm)
        sizes = [read_image(files[0], lambda image: image.size) for files in photos.files]
        counts = [self.geometry.square_count((height, width)) for width, height in sizes]
        self.photo_of = self.photo_of.repeat_interleave(torch.tensor(counts))
        self.window_of = [number for count in counts for number in range(count)]
        self.view_geometry = self.geometry
        self.geometry = self.geometry.of_window

    def __getitem__(self, index: int) -> dict:
        sample = self.photos[int(self.photo_of[index])]
        target = sample["target"]
        view = self.view_geometry.view(target.shape[:2])
        row, column = divmod(self.window_of[index], len(view.cols.starts))
        rows = view.rows.pixels(row, target.shape[0])
        columns = view.cols.pixels(column, target.shape[1])
        window = self.view_geometry.squares(sample["image"])[self.window_of[index]]
        return sample | {"image": window, "target": target[rows, columns].copy()}


def training_samples(photos: ImageDataset, mllm: "FrozenMLLM") -> TrainingSamples:
    """Return what a model sees of training photos."""
    if mllm.geometry.resize == SLIDE:
        return WindowSamples(photos, mllm)
    return TrainingSamples(photos, mllm)
