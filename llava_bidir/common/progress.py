"""How far a step is: what a training writes for `llava-bidir status` to read."""

from dataclasses import dataclass

PROGRESS = "progress.json"  # in the folder of a training


@dataclass(frozen=True, kw_only=True)
class StepProgress:
    """How far a step is; None for what is not known.

    Args:
        done: Steps that are done: of the optimizer, of a study, or benchmarks.
        of: Number of these.
        left_s: Seconds left.
        loss: Last loss of a training.
        samples_per_s: Its speed over all devices.
    """

    done: int | None = None
    of: int | None = None
    left_s: float | None = None
    loss: float | None = None
    samples_per_s: float | None = None
