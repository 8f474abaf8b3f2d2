"""What probes predict: one file per task, and the registry of `data.task`."""

from llava_bidir.common.errors import UserError
from llava_bidir.common.imports import HINT, check_takes

from .base import Task as Task
from .boundaries import Boundaries
from .depth import Depth
from .normals import Normals
from .segmentation import Segmentation

SEGMENTATION = Segmentation.name  # the paper's task, and the default
TASKS: dict[str, Task] = {
    task.name: task for task in (Segmentation(), Depth(), Normals(), Boundaries())
}


def find_task(name: str) -> Task:
    """Return the task of a name, or raise a UserError."""
    if name not in TASKS:
        raise UserError(f"there is no task {name!r}; expected one of {', '.join(TASKS)}; {HINT}")
    return TASKS[name]


def register_task(task: Task) -> None:
    """Add a task of a file of your own for `data.task`; commands get it by `--import FILE.py`.

    `probes solve`, `fit` and `study` make its probes, also without those of segmentation, and a report judges the
    claims in its main score. tests/extending/task.py is one.

    Args:
        task: An object of a subclass of :class:`probes.Task`, or of :class:`probes.Segmentation` for classes.

    Raises:
        UserError: It is no task, its name cannot be one or is taken, or it lacks targets.
    """
    if not isinstance(task, Task):
        raise UserError(
            f"task {task!r}: expected an object of a subclass of probes.Task, e.g. MyTask()"
        )
    name = getattr(task, "name", "")
    if not name.isidentifier() or name in TASKS:
        raise UserError(f"task {name!r}: expected a new name of letters, digits and _")
    if not hasattr(task, "targets"):
        raise UserError(
            f"task {name!r} says no targets: the kind of data that it reads, e.g. depth"
        )
    for method in (task.read, task.values, task.truth):
        check_takes(method, "target")
    check_takes(task.predict, "maps")
    check_takes(task.image_scores, "prediction", "target")
    TASKS[name] = task
