"""A finished run of segmentation probes: its counts of pixels by class and by patch."""

from torch import Tensor

from llava_bidir.common.errors import UserError
from probes.ops.pixel_counts import Counts
from probes.tasks import SEGMENTATION

from .finished_run import FinishedRun


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

    @property
    def counts(self) -> Counts:
        """Counts of the probes."""
        return Counts(**{name: self._tensors[name] for name in Counts._fields})

    @property
    def patch_classes(self) -> Tensor:
        """Class of most labelled pixels under each token, long[N, T]; -1 if none is labelled."""
        return self._tensors["patch_class"]
