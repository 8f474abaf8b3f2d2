"""Position alone: a probe that never sees a picture, whose feature is the place of a token on the grid.

The features of every image are one-hot places, so that its logits are one map, bilinear between tokens as those of any
probe are. Loss, folds, strengths and certificates are those of a site. The targets of a fold are added up first, since
its images have the same features: the problem of a large data set is as small as that of a few photos.

Legend: N images, F folds, K channels, h w token grid, T = h * w, M sums per image.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llava_bidir.common.processes import worker_options
from probes.data.batches import MaskPreparer
from probes.data.image_dataset import ImageDataset
from probes.ops.geometry import Geometry, ignored_label
from probes.ops.normal_equations import NormalEquations, add_up_equations, join_equations
from probes.ops.quadrature import PreparedMasks, add_up_masks
from probes.score.image_metrics import TaskMetric
from probes.tasks import Task

from .held_out import lone_classes
from .least_squares import check_values, solve_values
from .objective import NODES, SiteProblem
from .refinement import solve_classes
from .solution import Certificate, Solution
from .states import Targets, prepare_values


@dataclass(frozen=True)
class PositionProbe:
    """The probe of position alone.

    Args:
        solution: At all strengths; its features are the tokens that are labelled in some image.
        output: f32[K, h, w], its logits, or channels, at the chosen strength: the same for any image.
    """

    solution: Solution
    output: Tensor

    @property
    def converged(self) -> bool:
        """Whether it has a certificate; a closed form needs none."""
        certificates = self.solution.certificates.tolist()
        return not certificates or Certificate(*certificates[self.solution.row]).converged

    def sums(self, images: ImageDataset, task: Task, geometry: Geometry) -> Tensor:
        """Return what the scores of a task are computed from, f[N, M] of N images."""
        metric = TaskMetric(task, images=len(images), geometry=geometry)
        for index in range(len(images)):
            target = torch.from_numpy(images[index]["target"])
            metric.update(self.output[None, None], [target], torch.tensor([index]))
        return task.sums(metric.compute())[0]


@torch.no_grad()
def solve_position(data: "TrainingTargets", fold_of: Tensor) -> PositionProbe:
    """Return the probe of position alone at the optimum of its loss, at the strength that folds i64[N] choose."""
    targets = add_up_targets(data, fold_of)
    grid = data.geometry.grid
    # of a token that is never labelled, as in padding, nothing is known
    places = torch.eye(grid[0] * grid[1])[:, _labelled_tokens(targets.prepared)]
    states = places.expand(len(targets.fold_of), -1, -1)
    if data.task.loss is None:
        solution = solve_values(
            states, equations=targets.prepared, grid=grid, fold_of=targets.fold_of
        )
    else:
        problem = SiteProblem(
            loss=data.task.loss,
            states=states,
            masks=targets.prepared,
            fold_of=targets.fold_of,
            scored=targets.scored,
        )
        solution = solve_classes(problem)
    return PositionProbe(solution, output=solution.logits(places[None], grid)[solution.row, 0])


def _labelled_tokens(prepared: PreparedMasks | NormalEquations) -> Tensor:
    """Return the tokens that stand for a labelled pixel of some image, bool[T]."""
    if isinstance(prepared, NormalEquations):
        return prepared.weight.sum(0) > 0
    return prepared.soft.sum((0, 1)).flatten() > 0


def add_up_targets(data: "TrainingTargets", fold_of: Tensor) -> Targets:
    """Return the targets of all images, added up by fold i64[N], and by kind of placement on the grid.

    Raises:
        UserError: No fold can test the probe of the others.
    """
    folds = fold_of.tolist()
    if data.task.loss is None:
        equations = join_equations(list(data.prepared()))
        check_values(equations, fold_of)
        sums = add_up_equations(equations, fold_of)
        return Targets(sums, scored=None, fold_of=torch.arange(len(sums.weight)))
    masks, fold_of_sum = add_up_masks(data.prepared(), folds)
    fold_of_sum = torch.tensor(fold_of_sum)
    lone = lone_classes(masks, fold_of_sum)
    scored = None
    if lone.any():
        scored, _ = add_up_masks(data.prepared(ignored=lone[fold_of]), folds)
    return Targets(masks, scored=scored, fold_of=fold_of_sum)


@dataclass(frozen=True)
class TrainingTargets:
    """The targets of training images, which position alone is solved on.

    Args:
        images: N.
        task: What is predicted.
        channels: K.
        geometry: How the model sees images.
        workers: Processes that read targets.
    """

    images: ImageDataset
    task: Task
    channels: int
    geometry: Geometry
    workers: int = 0

    def prepared(
        self, ignored: Tensor | None = None
    ) -> Iterator[PreparedMasks] | Iterator[NormalEquations]:
        """Yield the prepared target of each image; `ignored` bool[N, K] are classes that do not count there."""
        items = _PreparedTargets(self, ignored)
        yield from DataLoader(items, batch_size=None, **worker_options(self.workers))


class _PreparedTargets(Dataset):
    """Prepared targets by number of their image."""

    def __init__(self, data: TrainingTargets, ignored: Tensor | None):
        self.data = data
        self.ignored = ignored

    def __len__(self) -> int:
        return len(self.data.images)

    def __getitem__(self, index: int) -> PreparedMasks | NormalEquations:
        data = self.data
        target = torch.from_numpy(data.images[index]["target"])
        if data.task.loss is None:
            return prepare_values(target, data.task, data.channels, data.geometry)
        if self.ignored is not None:
            classes = self.ignored[index].nonzero().flatten()
            target = target.masked_fill(torch.isin(target, classes), ignored_label(target))
        return MaskPreparer(data.geometry, data.channels, NODES)([target])
