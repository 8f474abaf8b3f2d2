"""Loss curves of trainings as one CSV file, from what TensorBoard's logger wrote."""

import csv
import io
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llava_bidir.common.files import write_files

SCALARS = ("train/loss", "train/grad_norm", "val/loss", "val/answer_accuracy")


def write_loss_curves(out: Path, runs: dict[str, Path]) -> None:
    """Write rows of training, step, name and value to the CSV file `out`.

    Args:
        out: File to write.
        runs: Folder of each training.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("training", "step", "name", "value"))
    for training, folder in runs.items():
        for name, curve in read_curves(folder).items():
            for step, value in curve:
                table.writerow((training, step, name.removeprefix("train/"), f"{value:.6g}"))
    write_files({out: text.getvalue()})


def read_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the steps and values of each scalar; of a step that a resumed run repeated, the last value.

    A folder that does not exist has none.
    """
    if not folder.is_dir():
        return {}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    logged = events.Tags()["scalars"]
    curves = {}
    for name in SCALARS:
        if name not in logged:
            continue
        by_step = {}
        for event in sorted(events.Scalars(name), key=lambda event: event.wall_time):
            by_step[event.step] = event.value
        curves[name] = sorted(by_step.items())
    return curves
