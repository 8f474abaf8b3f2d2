"""Samples and batches of probe training: pixels, or states cached from one frozen forward pass.

Shapes: B images, T image tokens, d width of a site, H W pixels of a mask.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from llava_bidir.common.errors import UserError
from llava_bidir.common.processes import worker_options
from probes.ops.geometry import Geometry, ignored_label
from probes.ops.quadrature import PreparedMasks, join_masks, prepare_masks

from .available_memory import available_memory
from .samplers import PAD_INDEX

if TYPE_CHECKING:  # a report needs no model
    from probes.models.frozen_mllm import FrozenMLLM


class ProbeBatch(TypedDict, total=False):
    """A batch of B images, or a part of one.

    Args:
        index: Numbers of the images in their split, i64[B].
        pixels: f[squares, 3, H', W'].
        target: B targets of the size of their image: uint8[H, W], of depth f32[H, W], of normals f32[H, W, 3].
        masks: The targets as the loss takes them, if the dataset prepares them.
        states: {site: f[B, T, d]} in place of pixels, if they are cached.
    """

    index: Tensor
    pixels: Tensor
    target: list[Tensor]
    masks: PreparedMasks
    states: dict[str, Tensor]


class MaskPreparer(NamedTuple):
    """Prepares masks for the loss; see :func:`probes.prepare_masks`."""

    geometry: Geometry
    classes: int
    nodes: int | None

    def __call__(self, target: Sequence[Tensor] | Tensor) -> PreparedMasks:
        """Return B targets of a data set, prepared."""
        prepared = []
        for mask in target:
            view = self.geometry.view(mask.shape)
            grid = self.geometry.grid
            prepared.append(
                prepare_masks(
                    mask[None],
                    self.classes,
                    grid,
                    nodes=self.nodes,
                    ignore_index=ignored_label(mask),
                    view=view,
                )
            )
        return join_masks(prepared)


class PreprocessedDataset(Dataset):
    """A dataset as tensors: {"index", "pixels": f[squares, 3, H', W'], "target": uint8[H, W]}.

    Targets of other tasks are f32[H, W] (depth) or f32[H, W, 3] (normals). Index `PAD_INDEX` returns an image whose
    pixels are all ignored, or NaN where targets are real numbers.

    Args:
        dataset: The dataset.
        preprocess: Returns the pixels of a list of images.
        prepare: Prepares the mask for the loss, as "masks"; None to leave it.
    """

    def __init__(self, dataset: Dataset, preprocess: Callable, prepare: MaskPreparer | None = None):
        self.dataset = dataset
        self.preprocess = preprocess
        self.prepare = prepare

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        sample = self.dataset[index]
        tensors = {"pixels": self.preprocess([sample["image"]])}
        tensors |= _numbered(torch.from_numpy(sample["target"]), index)
        if self.prepare:
            tensors["masks"] = self.prepare(tensors["target"][None])
        return tensors


def _numbered(target: Tensor, index: int) -> dict:
    """Return index and target of an image; one that only fills a batch has nothing in its target."""
    if index == PAD_INDEX:
        ignored = torch.nan if target.is_floating_point() else ignored_label(target)
        target = torch.full_like(target, ignored)
    return {"index": index, "target": target}


def collate(samples: list[dict] | ProbeBatch) -> ProbeBatch:
    """Return the batch of samples; a batch of cached states is returned as it is."""
    if isinstance(samples, dict):
        return samples
    columns = {name: [sample[name] for sample in samples] for name in samples[0]}
    join = {"index": torch.tensor, "pixels": torch.cat, "masks": join_masks}
    return {name: join.get(name, list)(column) for name, column in columns.items()}


class CachedFeatures(Dataset):
    """The states of all images at some sites, computed once and kept in CPU memory.

    Args:
        mllm: The model; its states are cached in its dtype.
        images: The preprocessed dataset.
        sites: The sites to cache.
        batch_size: Images per forward pass.
        workers: Processes that open images.
        copies: Processes on this machine. Each keeps all states, because a batch may have any image on any rank.
        name: Label of the progress bar.

    Raises:
        UserError: If the states do not fit into memory.
    """

    def __init__(
        self,
        mllm: "FrozenMLLM",
        images: PreprocessedDataset,
        sites: Sequence[str],
        *,
        batch_size: int,
        workers: int = 0,
        copies: int = 1,
        name: str = "states",
    ):
        need = copies * len(images) * (mllm.state_bytes(sites) + images[0]["target"].nbytes)
        available = available_memory()
        if need > 0.8 * available:
            raise UserError(
                f"data.cache_features needs {need / 1e9:.2f} GB for {name}, but {available / 1e9:.1f} GB are free; "
                "choose fewer model.sites or set data.cache_features to false"
            )
        shape = (len(images), mllm.grid[0] * mllm.grid[1])
        dtype = mllm.model.dtype
        self.states = {site: torch.empty(*shape, mllm.widths[site], dtype=dtype) for site in sites}
        self.samples: list[dict] = []  # without pixels
        loader = DataLoader(images, batch_size, collate_fn=list, **worker_options(workers))
        for samples in tqdm(loader, desc=f"caching {name}", mininterval=5):
            pixels = torch.cat([sample.pop("pixels") for sample in samples])
            index = [sample["index"] for sample in samples]
            for site, states in mllm.states(pixels, sites).items():
                self.states[site][index] = states.cpu()
            self.samples += samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, indices: list[int]) -> ProbeBatch:
        """Return a batch with states in place of pixels."""
        samples = [self.samples[i] | _numbered(self.samples[i]["target"], i) for i in indices]
        states = {site: states[indices] for site, states in self.states.items()}
        return collate(samples) | {"states": states}


def group_by_size(targets: list[Tensor]) -> list[tuple[list[int], Tensor]]:
    """Group the targets of a batch by size: (indices of the images, uint8[n, H, W]) per size."""
    sizes = {}
    for i, target in enumerate(targets):
        sizes.setdefault(target.shape, []).append(i)
    return [(images, torch.stack([targets[i] for i in images])) for images in sizes.values()]


def square_rows(targets: Sequence[Tensor], geometry: Geometry) -> list[slice]:
    """Return the rows of a batch's pixels, or of what is made of them, that are the squares of each image."""
    rows = []
    start = 0
    for target in targets:
        stop = start + geometry.square_count(target.shape[:2])
        rows.append(slice(start, stop))
        start = stop
    return rows


def outputs_by_size(
    outputs: Tensor, targets: Sequence[Tensor], geometry: Geometry
) -> list[tuple[list[int], Tensor, Tensor]]:
    """Group a batch by size of the images: (their indices, outputs f[P, n, K, h, w], targets uint8[n, H, W]) per size.

    Args:
        outputs: Of probes on the grids of all squares, f[P, squares, K, h, w].
        targets: B targets.
        geometry: Which squares are those of an image.
    """
    rows = square_rows(targets, geometry)
    groups = []
    for images, target in group_by_size(targets):
        size = target.shape[1:3]
        joined = [geometry.join(outputs[:, rows[i]], size) for i in images]
        groups.append((images, torch.stack(joined, 1), target))
    return groups
