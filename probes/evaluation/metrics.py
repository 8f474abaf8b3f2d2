"""Integer counts of pixels, and the scores that follow from them.

Counts are kept by image, so that intervals can resample images, and by image index: each image counts once, on any
number of ranks. Scores are of the whole dataset: intersections and unions are summed over images before they are
divided.

Shapes: S sites, N images, K classes, h w the token grid, T = h * w, H W pixels.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from probes.data.batches import group_by_mask_size
from probes.models.frozen_mllm import ADAPTER, ENCODER, FrozenMLLM
from probes.ops.bilinear import upsampled_argmax
from probes.ops.geometry import Geometry, GridPlacement
from probes.ops.kernels import use_triton

IGNORE_INDEX = 255
BY_IMAGE = ("intersection", "predicted", "labelled", "patch_right", "patch_valid")
PIXELS_AT_ONCE = {"cpu": 2**18, "cuda": 2**26}  # of masks and predicted maps, which are counted and forgotten


class Counts(NamedTuple):
    """Pixels by image: what mIoU, pixel accuracy and accuracy by patch are made of.

    Args:
        intersection, predicted: long[S, N, K], pixels of a class that are predicted as it; pixels predicted as it.
        labelled: long[N, K], pixels of each class.
        patch_right: long[S, N, T], rightly predicted pixels under each token.
        patch_valid: long[N, T], labelled pixels under each token.
        confusion: long[S, K, K], pixels of each label and prediction, over all images; None where not asked for.
    """

    intersection: Tensor
    predicted: Tensor
    labelled: Tensor
    patch_right: Tensor
    patch_valid: Tensor
    confusion: Tensor | None = None


@torch.no_grad()
def count(
    logits: Tensor, target: Tensor, view: GridPlacement | None = None, *, by_token: bool = True, confusion: bool = False
) -> Counts:
    """Upsamples logits, takes the best class of each pixel and counts, without keeping the predicted maps.

    Args:
        logits: f[S, N, K, h, w], finite.
        target: uint8[N, H, W], 255 ignored.
        view: Where the grid lies on the pixels; by default it divides them. Pixels that no token sees count for the
            image, but under no token.
        by_token: False counts under each image as a whole, T = 1, instead of under each token.
        confusion: Counts pairs of label and prediction, too.
    """
    sites, images, classes, h, w = logits.shape
    view, tokens = view or GridPlacement.full(tuple(target.shape[1:])), h * w if by_token else 1
    # Made first and filled: small tensors kept between large ones that come and go would pin the memory of these.
    new = lambda *shape: target.new_zeros(shape, dtype=torch.long)
    counts = Counts(
        new(sites, images, classes),
        new(sites, images, classes),
        new(images, classes),
        new(sites, images, tokens),
        new(images, tokens),
        new(sites, classes, classes) if confusion else None,
    )
    for few in _few_at_once(target):
        _fill(counts, few, _count(logits[:, few], target[few], view, by_token, confusion))
    return counts


def _fill(counts: Counts, images: slice, found: Counts) -> None:
    for name in BY_IMAGE:
        getattr(counts, name)[..., images, :] = getattr(found, name)
    if counts.confusion is not None:
        counts.confusion.add_(found.confusion)


def _few_at_once(target: Tensor) -> list[slice]:
    """The images of a batch in groups whose numbers of pixels, eight bytes each, take little memory; at least one."""
    step = max(1, PIXELS_AT_ONCE.get(target.device.type, PIXELS_AT_ONCE["cuda"]) // target.shape[1:].numel())
    return [slice(first, first + step) for first in range(0, max(1, len(target)), step)]


def _count(logits: Tensor, target: Tensor, view: GridPlacement, by_token: bool, confusion: bool) -> Counts:
    sites, images, classes, *grid = logits.shape
    size, tokens = tuple(target.shape[1:]), grid[0] * grid[1]
    valid, labels = target != IGNORE_INDEX, target.long()
    row, column = _cells(view, tuple(grid), size, target.device)
    token = torch.where((row[:, None] >= 0) & (column >= 0), row[:, None] * grid[1] + column, tokens)  # T: none
    labelled = _tally(labels.where(valid, classes), valid, classes)
    patch_valid = _tally(token.expand_as(target), valid, tokens)
    if use_triton(logits):
        from probes.ops.kernels.argmax_counts import count_cells
        from probes.ops.kernels.grid_cells import half_cells

        axes = half_cells(tuple(grid), size, view, logits.device)
        found = count_cells(logits, target, *axes, IGNORE_INDEX, confusion)
    else:
        found = _count_in_chunks(logits, labels, valid, token, view, confusion)
    intersection, predicted, patch_right, pairs = (None if x is None else x.long() for x in found)
    if not by_token:
        patch_right, patch_valid = (x.sum(-1, keepdim=True) for x in (intersection, labelled))
    return Counts(intersection, predicted, labelled, patch_right.flatten(2), patch_valid, pairs)


@lru_cache(maxsize=256)
def _cells(view: GridPlacement, grid: tuple[int, int], size: tuple[int, int], device: torch.device) -> list[Tensor]:
    """`view.token_of_pixel`, at hand on the device: a copy would wait for it."""
    return [cell.to(device) for cell in view.token_of_pixel(grid, size)]


def _count_in_chunks(
    logits: Tensor, labels: Tensor, valid: Tensor, token: Tensor, view: GridPlacement, confusion: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """intersection, predicted long[S, N, K], patch_right long[S, N, T] and confusion, from a few maps at a time."""
    (sites, images, classes, *grid), size = logits.shape, tuple(labels.shape[1:])
    grids, tokens = sites * images, grid[0] * grid[1]
    number = torch.arange(grids, device=labels.device)
    found = [labels.new_empty(grids, n) for n in (classes, classes, tokens)]
    pairs = labels.new_zeros(sites, classes, classes) if confusion else None
    step = max(1, PIXELS_AT_ONCE.get(labels.device.type, PIXELS_AT_ONCE["cuda"]) // labels[0].numel())
    for first in range(0, grids, step):
        chunk = slice(first, first + step)
        site, image = number[chunk] // images, number[chunk] % images
        best = upsampled_argmax(logits.flatten(0, 1)[chunk], size, view).long()
        label, kept = labels[image], valid[image]
        right = (best == label) & kept
        found[0][chunk] = _tally(best, right, classes)
        found[1][chunk] = _tally(best, kept, classes)
        found[2][chunk] = _tally(token.expand_as(best), right, tokens)
        if confusion:
            pair = (site.view(-1, 1, 1) * classes + label.where(kept, 0)) * classes + best
            pairs.view(-1).scatter_add_(0, pair.flatten(), kept.flatten().long())
    return *(x.unflatten(0, (sites, images)) for x in found), pairs


def _tally(number: Tensor, kept: Tensor, numbers: int) -> Tensor:
    """How many pixels that are kept have each of the `numbers`, long[n, numbers], from long[n, H, W] and bool[n, H, W];
    the number behind the last is nobody's. Integers only, and no value is looked at: the same on any device."""
    counts = number.new_zeros(len(number), numbers + 1)
    return counts.scatter_add_(1, number.flatten(1), kept.flatten(1).long())[:, :numbers]


def patch_labels(
    target: Tensor, classes: int, grid: tuple[int, int], purity: float = 0.0, view: GridPlacement | None = None
) -> Tensor:
    """The class that most labelled pixels under each token have, long[B, T]; -1 where none is labelled.

    Args:
        target: uint8[B, H, W], 255 ignored.
        classes: K.
        grid: Of the tokens.
        purity: Tokens of whose labelled pixels a smaller share has that class get -1 too: they lie on a boundary.
        view: Where the grid lies on the pixels; by default it divides them.
    """
    view = view or GridPlacement.full(tuple(target.shape[1:]))
    labels = target.new_empty((len(target), grid[0] * grid[1]), dtype=torch.long)
    for few in _few_at_once(target):
        labels[few] = _patch_labels(target[few], classes, grid, purity, view)
    return labels


def _patch_labels(target: Tensor, classes: int, grid: tuple[int, int], purity: float, view: GridPlacement) -> Tensor:
    images, tokens, size = len(target), grid[0] * grid[1], tuple(target.shape[1:])
    row, column = (cell.to(target.device) for cell in view.token_of_pixel(grid, size))
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
        images: Size of the dataset; `compute` insists on having seen each of its images, and none twice.
        classes: K.
        geometry: Where the tokens lie on the images.
        by_token: False keeps no counts by token, see `count`.
        confusion: Counts pairs of label and prediction, too.
    """

    full_state_update = False

    def __init__(
        self,
        sites: int,
        images: int,
        classes: int,
        geometry: Geometry,
        by_token: bool = True,
        confusion: bool = False,
    ):
        super().__init__()
        self.images, self.geometry, self.by_token = images, geometry, by_token
        self.add_state("index", default=[], dist_reduce_fx="cat")
        for name in BY_IMAGE:
            self.add_state(name, default=[], dist_reduce_fx="cat")
        self.confusion = None
        if confusion:
            pairs = torch.zeros(sites, classes, classes, dtype=torch.long)
            self.add_state("confusion", default=pairs, dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor, index: Tensor) -> None:
        """Adds images: `logits` f[S, B, K, h, w] on the grid, `target` uint8[B, H, W], `index` long[B]."""
        view = self.geometry.view(tuple(target.shape[-2:]))
        counts = count(logits, target, view, by_token=self.by_token, confusion=self.confusion is not None)
        self.index.append(index)
        for name in BY_IMAGE:
            value = getattr(counts, name)
            # images first, for ranks are joined along the first axis
            by_image = value.transpose(0, 1) if value.ndim == 3 else value
            getattr(self, name).append(by_image.to(torch.int32))
        if self.confusion is not None:
            self.confusion += counts.confusion

    def compute(self) -> Counts:
        """Counts of the dataset, images in its order.

        Raises:
            RuntimeError: An image of the dataset was not seen, or seen twice.
        """
        index = _joined(self.index)
        seen, order = index.sort()
        if len(index) > len(seen.unique()):
            raise RuntimeError(f"the metric saw image {seen[:-1][seen.diff() == 0][0]} more than once")
        if len(index) != self.images:
            raise RuntimeError(f"the metric saw {len(index)} of {self.images} images")
        kept = {name: _joined(getattr(self, name))[order].long() for name in BY_IMAGE}
        by_site = {k: v.transpose(0, 1) if v.ndim == 3 else v for k, v in kept.items()}
        return Counts(**by_site, confusion=self.confusion)


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


def peak_layer(miou: dict[str, float]) -> str | None:
    """The decoder layer that segments best; `final_norm` is the last layer once more and does not compete."""
    layers = [site for site in miou if site.startswith("layer_")]
    return max(layers, key=miou.__getitem__, default=None)


def summary(miou: dict[str, float]) -> dict[str, Any]:
    """Encoder, adapter and peak LLM mIoU, and what Table 2 derives from them; None where a site was not probed."""
    peak = peak_layer(miou)
    encoder, adapter, best = miou.get(ENCODER), miou.get(ADAPTER), miou.get(peak)
    minus = lambda a, b: None if a is None or b is None else a - b
    return {
        "encoder": encoder,
        "adapter": adapter,
        "peak_llm": best,
        "peak_site": peak,
        "delta_enc": minus(best, encoder),
        "recovery": minus(best, adapter),
    }


def true_classes(targets: Tensor | list[Tensor], classes: int, mllm: FrozenMLLM) -> Tensor:
    """The class that most pixels under each patch have, long[B, T], -1 where none is labelled."""
    truth = torch.empty(len(targets), mllm.grid[0] * mllm.grid[1], dtype=torch.long)
    for images, target in group_by_mask_size(targets):
        view = mllm.geometry.view(target.shape[1:])
        truth[images] = patch_labels(target, classes, mllm.grid, view=view)
    return truth
