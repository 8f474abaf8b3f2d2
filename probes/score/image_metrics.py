"""What a task counts over the images of a dataset, each image once, by batches and processes.

Legend: P probes, N images of the dataset, B images of a batch, K channels of a probe, h w token grid.
"""

from collections.abc import Sequence

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from probes.data.batches import outputs_by_size
from probes.ops.geometry import Geometry
from probes.tasks import Task


class TaskMetric(Metric):
    """What a task counts of each image of a dataset; torchmetrics joins batches and processes.

    Scores are `task.dataset_scores(task.sums(metric.compute()))`.

    Args:
        task: The task.
        images: N, size of the dataset; `compute` requires each image exactly once.
        geometry: Placement of the tokens on the images.
        probes_of_run: Indices of the probes that are the run's, None for all. Of the others, which have another
            strength, is kept what scores need.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(
        self,
        task: Task,
        images: int,
        geometry: Geometry,
        probes_of_run: Sequence[int] | None = None,
    ):
        super().__init__(compute_with_cache=False)  # a second copy of all counts
        self.task = task
        self.images = images
        self.geometry = geometry
        self.probes_of_run = probes_of_run
        for name in ("index", *task.counted):  # images first, as they are joined
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, outputs: Tensor, target: Sequence[Tensor] | Tensor, index: Tensor) -> None:
        """Add a batch.

        Args:
            outputs: Of the probes on the token grid of each square, f[P, squares, K, h, w].
            target: [B, H, W, ...], or a list of B targets.
            index: i64[B], of the images in the dataset.
        """
        for images, outputs_of_size, target_of_size in outputs_by_size(
            outputs, target, self.geometry
        ):
            counted = self.task.count(
                outputs_of_size, target=target_of_size, geometry=self.geometry
            )
            self.index.append(index[images])
            for name, counts in counted.items():
                is_by_probe = counts.ndim == 3
                if is_by_probe and self.probes_of_run is not None and name not in self.task.summed:
                    counts = counts[self.probes_of_run]
                if is_by_probe:
                    counts = counts.transpose(0, 1)
                getattr(self, name).append(counts)

    def compute(self) -> dict[str, Tensor]:
        """Return the tensors [P, N, ...] or [N, n] of all processes by name, integers as i64.

        Images are in the order of the dataset, tensors on the CPU.

        Raises:
            RuntimeError: If an image of the dataset was not seen exactly once.
        """
        index, order = dim_zero_cat(self.index).cpu().sort()
        if index.tolist() != list(range(self.images)):
            raise RuntimeError(
                f"expected each of {self.images} images once, saw {len(index)}, {len(index.unique())} different"
            )
        tensors = {}
        for name in self.task.counted:
            tensor = dim_zero_cat(getattr(self, name)).cpu()[order]
            if tensor.ndim == 3:
                tensor = tensor.transpose(0, 1)
            if not tensor.is_floating_point():
                tensor = tensor.long()
            tensors[name] = tensor
        return tensors
