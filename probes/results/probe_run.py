"""A finished run of segmentation probes: its counts of pixels by class and by patch."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch

from llava_bidir.common.errors import UserError
from probes.ops.pixel_counts import Counts
from probes.tasks import SEGMENTATION

from .finished_run import FinishedRun

# Axes of the counts: S sites, N images, K classes, T image tokens. The last one is not in every run.
COUNTS = {
    "intersection": "SNK",
    "predicted": "SNK",
    "labelled": "NK",
    "patch_right": "SNT",
    "patch_valid": "NT",
    "group": "N",
}
# R solved strengths of each site
PATH = {
    "optimum/intersection": "RSNK",
    "optimum/predicted": "RSNK",
    "optimum/cross_entropy": "RSN",
}


def check_tensors(
    tensors: dict[str, torch.Tensor],
    path: Path,
    axes: dict[str, str],
    sizes: dict[str, int],
    required: Sequence[str],
) -> None:
    """Raise a UserError that names `path` unless its counts and losses are non-negative and of these sizes."""
    if missing := [name for name in required if name not in tensors]:
        raise UserError(f"{path} has no {', '.join(missing)}; make the run again")
    for name, tensor in tensors.items():
        expected = [sizes[axis] for axis in axes.get(name, "")]
        floating = name.endswith("cross_entropy")
        valid = list(tensor.shape) == expected and tensor.is_floating_point() == floating
        if not valid or not ((tensor >= 0) & tensor.isfinite()).all():
            kind = "finite numbers" if floating else "integers"
            raise UserError(
                f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}; expected non-negative {kind} {expected} "
                "according to metrics.json; make the run again"
            )


def check_totals(counts: Counts, source: str) -> None:
    """Raise a UserError that begins with `source` unless each labelled pixel is counted once, and no other one."""
    right, predicted, labelled, patch_right, patch_valid = counts[:5]
    pixels = labelled.sum(-1)
    right_are_labelled = (right <= labelled).all() and (right <= predicted).all()
    if not right_are_labelled or (predicted.sum(-1) != pixels).any():
        raise UserError(
            f"{source}: intersection, predicted and labelled are not counts of the same pixels; make the run again"
        )
    if (patch_right > patch_valid).any() or (patch_valid.sum(-1) > pixels).any():
        raise UserError(
            f"{source}: more pixels are counted under tokens than are labelled; make the run again"
        )


class ProbeRun(FinishedRun):
    """A finished run of segmentation probes, for analyses; see :class:`FinishedRun`.

    Raises:
        UserError: If the probes of the run do not predict classes.
    """

    def _check_task(self) -> None:
        """Raise a UserError if the probes do not predict classes."""
        if self.task_name != SEGMENTATION:
            raise UserError(
                f"{self.path} has probes of the task {self.task_name}, but this is about classes; expected a run of "
                "segmentation. `probes report RUN --tasks RUN ...` and probes.open_run take runs of other tasks"
            )

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = self._read("counts.safetensors")
        path = self.path / "counts.safetensors"
        check_tensors(
            tensors,
            path,
            COUNTS,
            self._sizes,
            list(COUNTS)[:5],
        )
        check_totals(Counts(*(tensors[name] for name in list(COUNTS)[:5])), str(path))
        return tensors

    @property
    def _sizes(self) -> dict[str, int]:
        rows, columns = self.metrics["grid"]
        sizes = {
            "S": len(self.sites),
            "N": self.metrics["images"],
            "K": len(self.metrics["classes"]),
        }
        return sizes | {"T": rows * columns}

    @property
    def counts(self) -> Counts:
        """Counts of the probes."""
        return Counts(**{name: self._tensors[name] for name in Counts._fields})

    def counts_by_strength(self) -> list[Counts]:
        """Return the counts of each row of solved strengths, strong to weak.

        A row has another strength at each site; see `strengths`. The counts have one patch per image.

        Raises:
            UserError: If the probes were not solved, or the file is damaged.
        """
        path = self.path / "path.safetensors"
        sizes = self._sizes | {"R": len(self.strengths.solved[0])}
        tensors = self._read(path.name)
        labelled = self.counts.labelled
        check_tensors(
            tensors,
            path,
            PATH,
            sizes,
            list(PATH),
        )
        intersection, predicted, _ = (tensors[name] for name in PATH)
        valid = labelled.sum(-1, keepdim=True)
        counts = [
            Counts(
                right,
                total,
                labelled,
                patch_right=right.sum(-1, keepdim=True),
                patch_valid=valid,
            )
            for right, total in zip(intersection, predicted, strict=True)
        ]
        for at_strength in counts:
            check_totals(at_strength, str(path))
        return counts

    @property
    def sums(self) -> torch.Tensor:
        """Pixels of each class that are right, predicted and labelled in each image, i64[S, N, 3 K]."""
        return self.task.sums(self._tensors)

    def sums_by_strength(self) -> torch.Tensor:
        """Return these counts at each row of solved strengths, strong to weak, i64[R, S, N, 3 K]."""
        return torch.stack([self.task.sums(row._asdict()) for row in self.counts_by_strength()])
