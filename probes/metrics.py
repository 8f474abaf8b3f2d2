"""Integer counts of pixels, and the scores that follow from them.

Counts are kept by image, so that intervals can resample images, and by image index, so that an image seen twice (a
sampler that tops up the last round) counts once. Scores are of the whole dataset: intersections and unions are summed
over images before they are divided.

Shapes: S sites, N images, K classes, h w the token grid, T = h * w, H W pixels.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from .geometry import Geometry, View
from .upsample import upsampled_argmax

IGNORE_INDEX = 255


class Counts(NamedTuple):
    """Pixels by image: what mIoU, pixel accuracy and accuracy by patch are made of.

    Args:
        intersection, predicted: long[S, N, K], pixels of a class that are predicted as it; pixels predicted as it.
        labelled: long[N, K], pixels of each class.
        patch_right: long[S, N, T], rightly predicted pixels under each token.
        patch_valid: long[N, T], labelled pixels under each token.
    """

    intersection: Tensor
    predicted: Tensor
    labelled: Tensor
    patch_right: Tensor
    patch_valid: Tensor


def count(predicted: Tensor, target: Tensor, classes: int, grid: tuple[int, int], view: View | None = None) -> Counts:
    """Counts of a batch: `predicted` uint8[S, N, H, W] against `target` uint8[N, H, W], 255 ignored. Pixels that no
    token sees, by `view`, count for the image, but under no token."""
    sites, images = predicted.shape[:2]
    valid = target != IGNORE_INDEX
    right = (predicted == target) & valid
    # one bincount for all sites and images: bin = (site, image, class), with a class of its own for what is ignored
    bins = torch.arange(sites * images, device=target.device).view(sites, images, 1, 1) * (classes + 1)
    count_of = lambda label, kept: _bincount(bins[: len(label)] + torch.where(kept, label, classes), classes)
    return Counts(
        intersection=count_of(predicted, right).view(sites, images, classes),
        predicted=count_of(predicted, valid).view(sites, images, classes),
        labelled=count_of(target[None], valid[None]).view(images, classes),
        patch_right=_by_patch(right, grid, view),
        patch_valid=_by_patch(valid, grid, view),
    )


def _bincount(bins: Tensor, classes: int) -> Tensor:
    """Occurrences of each bin, those of the last class of each group left out."""
    groups = bins.shape[0] * bins.shape[1]
    return torch.bincount(bins.flatten(), minlength=groups * (classes + 1)).view(groups, classes + 1)[:, :classes]


def _by_patch(pixels: Tensor, grid: tuple[int, int], view: View | None) -> Tensor:
    """Sums bool[..., H, W] over the cells of the grid."""
    size = tuple(pixels.shape[-2:])
    cells = (view or View.whole(size)).cells(grid, size)
    rows, columns = (
        (cell == torch.arange(n)[:, None]).float().to(pixels.device) for n, cell in zip(grid, cells, strict=True)
    )
    return (rows @ pixels.float() @ columns.T).round().long().flatten(-2)


def patch_labels(
    target: Tensor, classes: int, grid: tuple[int, int], purity: float = 0.0, view: View | None = None
) -> Tensor:
    """The class that most labelled pixels under each token have, long[B, T]; -1 where none is labelled.

    Args:
        target: uint8[B, H, W], 255 ignored.
        classes: K.
        grid: Of the tokens.
        purity: Tokens of whose labelled pixels a smaller share has that class get -1 too: they lie on a boundary.
        view: Where the grid lies on the pixels; by default it divides them.
    """
    images, tokens, size = len(target), grid[0] * grid[1], tuple(target.shape[1:])
    row, column = (cell.to(target.device) for cell in (view or View.whole(size)).cells(grid, size))
    seen = (row[:, None] >= 0) & (column >= 0)
    token = (row[:, None] * grid[1] + column).where(seen, 0)
    label = torch.where((target == IGNORE_INDEX) | ~seen, classes, target.long())
    image = torch.arange(images, device=target.device).view(-1, 1, 1)
    bins = (image * tokens + token) * (classes + 1) + label
    votes = torch.bincount(bins.flatten(), minlength=images * tokens * (classes + 1)).view(images, tokens, -1)
    votes = votes[..., :classes]
    total, (most, label) = votes.sum(-1), votes.max(-1)
    return torch.where((total > 0) & (most >= purity * total), label, -1)


class SegmentationMetric(Metric):
    """Counts of a whole dataset, over batches and ranks, each image once.

    Args:
        sites: S.
        images: Size of the dataset; `compute` insists on having seen each of its images.
        classes: K.
        geometry: Where the tokens lie on the images.
    """

    full_state_update = False

    def __init__(self, sites: int, images: int, classes: int, geometry: Geometry):
        super().__init__()
        self.images, self.classes, self.geometry = images, classes, geometry
        tokens = geometry.grid[0] * geometry.grid[1]
        self._shapes = {
            "intersection": (sites, classes),
            "predicted": (sites, classes),
            "labelled": (classes,),
            "patch_right": (sites, tokens),
            "patch_valid": (tokens,),
        }
        self.add_state("index", default=[], dist_reduce_fx="cat")
        for name in self._shapes:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, logits: Tensor, target: Tensor, index: Tensor) -> None:
        """Adds images: `logits` f[S, B, K, h, w] on the grid, `target` uint8[B, H, W], `index` long[B]."""
        size = tuple(target.shape[-2:])
        view = self.geometry.view(size)
        counts = count(upsampled_argmax(logits, size, view), target, self.classes, self.geometry.grid, view)
        self.index.append(index)
        for name, value in counts._asdict().items():
            # images first, for ranks are joined along the first axis
            by_image = value.transpose(0, 1) if value.ndim == 3 else value
            getattr(self, name).append(by_image.to(torch.int32))

    def compute(self) -> Counts:
        """Counts of the dataset, images in its order.

        Raises:
            RuntimeError: An image of the dataset was not seen.
        """
        index = _joined(self.index)
        order = torch.unique(index, return_inverse=True)[1]
        first = torch.full((self.images,), len(index), device=index.device)
        if len(torch.unique(index)) != self.images:
            raise RuntimeError(f"the metric saw {len(torch.unique(index))} of {self.images} images")
        first.scatter_reduce_(0, order, torch.arange(len(index), device=index.device), "amin")
        kept = {name: _joined(getattr(self, name))[first].long() for name in self._shapes}
        return Counts(**{k: v.transpose(0, 1) if v.ndim == 3 else v for k, v in kept.items()})


def _joined(state: Tensor | list[Tensor]) -> Tensor:
    return torch.cat(state) if isinstance(state, list) else state


class Scores(NamedTuple):
    """Of one or many resamplings: iou f[..., K] with NaN for classes that occur neither as label nor as prediction."""

    miou: Tensor
    pacc: Tensor
    iou: Tensor


def scores(intersection: Tensor, predicted: Tensor, labelled: Tensor) -> Scores:
    """mIoU over the classes that occur, pixel accuracy, IoU by class, from sums over images [..., K], in float64."""
    intersection, predicted, labelled = (x.double() for x in (intersection, predicted, labelled))
    iou = intersection / (predicted + labelled - intersection)  # 0 / 0 = NaN: the class does not occur
    return Scores(iou.nanmean(-1), intersection.sum(-1) / labelled.sum(-1), iou)
