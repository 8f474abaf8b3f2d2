"""What probes predict besides classes: one file per task, and the registry of `data.task`."""

from .base import Task
from .boundaries import Boundaries
from .depth import Depth
from .normals import Normals

SEGMENTATION = "segmentation"  # the paper's task, which is not a `Task`: its scores are of classes
TASKS: dict[str, Task] = {task.name: task for task in (Depth(), Normals(), Boundaries())}


def targets_of(task: str) -> str:
    """Return the kind of targets that a task of `data.task` reads."""
    return TASKS[task].targets if task in TASKS else task
