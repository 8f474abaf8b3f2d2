"""A finished run of another task than segmentation, such as depth.

    RUN/metrics.json          scores per site with intervals; "task" and "scores" say which, and which way is better
    RUN/counts.safetensors    "sums" f32[S, N, M]: sums per image, from which the scores are computed; of depth and
                              normals "patch_error" f32[S, N, T], "patch_valid" f32[N, T]: errors and pixels by token
    RUN/path.safetensors      "closed_form/sums" (boundaries: "optimum/sums") f32[R, S, N, M] at the solved strengths of
                              regularisation, of `probes solve`

Axes: S sites, N images, T image tokens, M sums per image, R solved strengths of each site.
"""

import re
from functools import cached_property
from pathlib import Path

import torch

from llava_bidir.common.errors import UserError
from probes.tasks import SEGMENTATION, TASKS

from .finished_run import FinishedRun
from .probe_run import ProbeRun


def finished_runs(folder: str | Path) -> list[Path]:
    """Return the folders of all finished runs, trained models first, draws in order."""
    folder = Path(folder)
    found = {file.parent for pattern in ("*", "*/*", "*/*/*") for file in folder.glob(f"{pattern}/metrics.json")}
    number = lambda part: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", part)]
    key = lambda run: (not run.name.startswith(("trained", "probes")), *map(number, run.relative_to(folder).parts))
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
            raise UserError(f"{self.path} is a run of {self.task_name}; expected one of {', '.join(TASKS)}")

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        return self._read("counts.safetensors")

    @property
    def sums(self) -> torch.Tensor:
        """Sums per image, f32[S, N, M].

        Raises:
            UserError: If they are damaged.
        """
        return self._check("counts.safetensors", self._tensors, "sums", [])

    @property
    def has_patch_errors(self) -> bool:
        """Whether the run has errors by position; runs of earlier versions do not."""
        return "patch_error" in self._tensors

    @property
    def patch_errors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Errors f32[S, N, T] and pixels with a value f32[N, T] under each token.

        Raises:
            UserError: If a pixel of the task has no error of its own, the run has none, or they are damaged.
        """
        if self.task.pixel_error is None:
            of = ", ".join(name for name, task in TASKS.items() if task.pixel_error)
            raise UserError(
                f"{self.path} is a run of {self.task_name}, where a pixel has no error of its own, so that there is "
                f"none by position; expected a run of segmentation, {of}"
            )
        if not self.has_patch_errors:
            raise UserError(f"{self.path} was made before errors by position were kept; make the run again")
        (rows, columns), images = self.metrics["grid"], self.metrics["images"]
        error, valid = self._tensors["patch_error"], self._tensors.get("patch_valid", torch.empty(0))
        shapes = [list(error.shape), list(valid.shape)]
        expected = [[len(self.sites), images, rows * columns], [images, rows * columns]]
        if shapes != expected or not all((x >= 0).all() and x.isfinite().all() for x in (error, valid)):
            raise UserError(
                f"{self.path / 'counts.safetensors'}: patch_error and patch_valid are {shapes}; expected non-negative "
                f"numbers {expected} according to metrics.json; make the run again"
            )
        return error, valid

    def path_sums(self) -> torch.Tensor:
        """Return the sums per image of each row of solved strengths, f32[R, S, N, M]; see `solved_strengths`.

        Raises:
            UserError: If the probes were not solved, or the file is damaged.
        """
        rows, tensors = len(self.solved_strengths[0]), self._read("path.safetensors")
        return self._check("path.safetensors", tensors, f"{self.instrument}/sums", [rows])

    def _check(self, file: str, tensors: dict[str, torch.Tensor], name: str, leading: list[int]) -> torch.Tensor:
        """Return a tensor, or raise a UserError that names the file unless it has the axes of metrics.json."""
        sums, expected = tensors.get(name), [*leading, len(self.sites), self.metrics["images"]]
        if sums is None or list(sums.shape[:-1]) != expected or not sums.isfinite().all():
            shape = None if sums is None else list(sums.shape)
            raise UserError(
                f"{self.path / file}: {name} is {shape}; expected finite numbers {[*expected, 'M']} according to "
                "metrics.json; make the run again"
            )
        return sums
