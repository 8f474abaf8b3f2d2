"""Scores of probes, their confidence intervals, and statistics of the states."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .image_metrics import TaskMetric as TaskMetric


def __getattr__(name: str):
    """Import TaskMetric on first use: torchmetrics takes a second, which a report does not need."""
    if name != "TaskMetric":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .image_metrics import TaskMetric

    return TaskMetric
