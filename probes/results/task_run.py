"""A finished run of another task than segmentation, such as depth.

    RUN/metrics.json          scores per site with intervals; "task" and "scores" say which, and which way is better
    RUN/counts.safetensors    "sums" f32[S, N, M]: sums per image, from which the scores are computed
    RUN/path.safetensors      "closed_form/sums" (boundaries: "optimum/sums") f32[R, S, N, M] at the solved strengths of
                              regularisation, of `probes solve`

Axes: S sites, N images, M sums per image, R solved strengths of each site.
"""

import re
from functools import cached_property
from pathlib import Path

import torch

from llava_bidir.common.errors import UserError
from probes.evaluation.estimate import Estimate
from probes.evaluation.layer_effects import effects_by_row, layer_effects
from probes.tasks import SEGMENTATION, TASKS

from .finished_run import FinishedRun
from .probe_run import ProbeRun


def finished_runs(folder: str | Path) -> list[Path]:
    """Return the folders of all finished runs, trained models first, draws in order."""
    folder = Path(folder)
    found = {
        file.parent
        for pattern in ("*", "*/*", "*/*/*")
        for file in folder.glob(f"{pattern}/metrics.json")
    }

    def number(part):
        return [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", part)]

    def key(run):
        return (
            not run.name.startswith(("trained", "probes")),
            *map(number, run.relative_to(folder).parts),
        )

    return sorted(found, key=key)


def open_run(path: str | Path) -> "ProbeRun | TaskRun":
    """Return a finished run of any task.

    Raises:
        UserError: If `path` is not a finished run.
    """
    return ProbeRun(path) if FinishedRun(path).task_name == SEGMENTATION else TaskRun(path)


class TaskRun(FinishedRun):
    """A finished run of another task than segmentation; see :class:`FinishedRun`.

    Raises:
        UserError: If the run is of segmentation, or of a task that is unknown here.
    """

    def check_task(self) -> None:
        """Raise a UserError if the run is of segmentation or of an unknown task."""
        if self.task_name not in TASKS:
            raise UserError(
                f"{self.path} is a run of {self.task_name}; expected one of {', '.join(TASKS)}"
            )

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        return self._read("counts.safetensors")

    @property
    def sums(self) -> torch.Tensor:
        """Sums per image, f32[S, N, M].

        Raises:
            UserError: If they are damaged.
        """
        sums = self._tensors.get("sums")
        expected = [len(self.sites), self.metrics["images"]]
        if sums is None or list(sums.shape[:-1]) != expected or not sums.isfinite().all():
            shape = None if sums is None else list(sums.shape)
            raise UserError(
                f"{self.path / 'counts.safetensors'}: sums is {shape}; expected finite numbers {[*expected, 'M']} "
                "according to metrics.json; make the run again"
            )
        return sums

    def compute_effects(self) -> dict[str, Estimate]:
        """Return the effects of the run in units of its main score, computed from its sums.

        Raises:
            UserError: If they are damaged.
        """
        effects = layer_effects(self.sites, self.task, self.sums, self.weights, self.groups)
        if self.is_solved and (self.path / "path.safetensors").is_file():
            path = self._read("path.safetensors")[f"{self.instrument}/sums"]
            effects |= effects_by_row(
                self.sites, self.strengths, self.task, path, self.weights, self.groups
            )
        return effects
