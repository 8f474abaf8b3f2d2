"""What probes predict: one file per task, and the registry of `data.task`."""

from .base import Task as Task
from .boundaries import Boundaries
from .depth import Depth
from .normals import Normals
from .segmentation import Segmentation

SEGMENTATION = Segmentation.name  # the paper's task, and the default
TASKS: dict[str, Task] = {
    task.name: task for task in (Segmentation(), Depth(), Normals(), Boundaries())
}
