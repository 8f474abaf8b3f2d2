"""`probes position`: what a probe scores that never sees a picture, and knows the place of a patch alone.

Classes have places: sky is above, floors are below. What a site reads is to be compared with this floor. The probe is
solved as those of the run are (probes/solve/position.py); no weights of the model are read.

position.json: "grid", "scores" {"miou", "miou_ci95", ...}, "strength", "loss" (held out, per pixel), "converged".
position.safetensors: "output" f32[K, h, w], its logits or channels, the same for any image.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from probes.config import SolverOptions

from .analysis import Analysis, Result, Row, RunOptions, table_row

if TYPE_CHECKING:  # this module answers `probes --help`
    from torch import Tensor

    from probes.data.image_dataset import ImageDataset
    from probes.runs.read import ProbeRun


@dataclass(frozen=True, kw_only=True)
class PositionOptions(RunOptions):
    """Which run; all else is as the run has it."""


def measure(run: "ProbeRun", options: PositionOptions) -> Result:
    """Return the scores of position alone on the validation images of a run."""
    from llava_bidir.common.processes import usable_cores
    from probes.solve.position import TrainingTargets, solve_position

    images = run.dataset("training")
    task = run.task
    channels = task.channels or len(run.metrics["classes"])
    workers = usable_cores()
    folds = run.metrics["probe"].get("folds", SolverOptions.folds)  # trained probes have none
    fold_of = folds_of(images, folds, workers)
    data = TrainingTargets(images, task, channels=channels, geometry=run.geometry, workers=workers)
    probe = solve_position(data, fold_of)
    solution = probe.solution
    chosen = int(solution.chosen)
    rows = {
        "grid": run.metrics["grid"],
        "scores": scores_of(run, probe.sums(run.dataset(), task, run.geometry)),
        "strength": solution.strengths[chosen].item(),
        "loss": solution.loss[chosen].item(),
        "converged": probe.converged,
    }
    return Result(rows, {"output": probe.output})


def folds_of(images: "ImageDataset", folds: int, workers: int) -> "Tensor":
    """Return the fold of each training image i64[N], as `probes solve` does: copies of an image share one."""
    from probes.data.samplers import assign_folds
    from probes.data.verify import group_copies, read_pairs

    pairs = read_pairs(images, name="training", indices=range(len(images)), workers=workers)
    group_copies(images, [pair.content for pair in pairs.values()])
    return assign_folds(images.groups or range(len(images)), folds)


def scores_of(run: "ProbeRun", sums: "Tensor") -> dict[str, Any]:
    """Return the scores with intervals over the run's images, from sums f[N, M]."""
    from llava_bidir.common.bootstrap import interval
    from probes.score.estimate import dataset_scores, resampled_scores

    task = run.task
    resampled = resampled_scores(task, sums[None], run.weights)
    scores = {}
    for name, values in dataset_scores(task, sums[None]).items():
        value = values.item()
        ends = interval(value, resampled[name][:, 0], lowest=0.0, highest=task.highest)
        scores |= {name: value, f"{name}_ci95": ends}
    return scores


def rows_of(results: dict[str, Any]) -> Iterator[Row]:
    """Yield the scores as rows of a study's table."""
    scores = results["scores"]
    for name in scores:
        if f"{name}_ci95" in scores:
            interval = scores[f"{name}_ci95"]
            yield table_row(None, f"position_{name}", value=scores[name], interval=interval)


ANALYSIS = Analysis(
    name="position",
    help="score a probe that knows the place of a patch alone, into RUN/position.json",
    question="What does the place of a patch tell, without the picture?",
    options=PositionOptions,
    measure=measure,
    rows=rows_of,
    default=True,
    of_encoders=True,
    of_any_task=True,
    every_task=True,
)
