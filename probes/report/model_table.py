"""One table over models: a row for each model, mask and data set of a report -> CSV, Markdown and LaTeX.

A row has the scores at encoder, adapter and best layer, how much the last is beyond random models, the accuracy of
answers in training, and the benchmarks of Table 1 that `llava-bidir vqa` has of the same weights.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_bidir.common.errors import UserError
from llava_bidir.common.files import read_json
from llava_bidir.common.identity import describe_digest
from llava_bidir.common.tables import Row, Score, format_tables
from probes.models.sites import ADAPTER, ENCODER
from probes.runs.formatting import Entry, format_csv
from probes.runs.read import ProbeRun
from probes.tasks import SEGMENTATION

from .best_layers import BETTER
from .ranking import compare_readings
from .readings import MainRun, ReportView, SiteReading
from .words import interval, number, site_name

BEST = "mIoU"  # of the best layer
BEYOND = "beyond random"
NOTE = (
    "Scores in %, MME in points; 95% intervals. Bold: shown to be better than each other model under its mask, and "
    "than itself under each other mask."
)


def format_model_table(
    view: ReportView, runs: Mapping[tuple, MainRun], table1: Sequence[Path], out: Path
) -> dict[Path, str]:
    """Return the contents of OUT/summary.csv, .md and .tex; {} of a single model under one mask.

    Args:
        view: Of the report's tables.
        runs: Main runs by task, data, key, mask and seed.
        table1: Files table1.json of `llava-bidir vqa` or `vqa-table`.
        out: Folder of the report.

    Raises:
        UserError: A file of `table1` cannot be read.
    """
    benchmarks: dict[str, Entry] = {}
    for file in table1:
        benchmarks |= read_benchmarks(file)
    entries = []
    for reading in view.readings:
        if reading.task == SEGMENTATION:
            of_weights = entry_of_weights(runs[reading.about].run, benchmarks)
            entries.append(entry_of_reading(reading, view) | of_weights)
    if len(entries) < 2:
        return {}
    for title in ("mask", "data", "seed"):
        values = {entry[title] for entry in entries}
        if len(values) == 1:
            for entry in entries:
                del entry[title]
    rows = [round_entry(entry) for entry in entries]
    files = format_tables(out / "summary", rows, note=NOTE)
    files[out / "summary.csv"] = format_csv(entries)
    return files


def entry_of_reading(reading: SiteReading, view: ReportView) -> Entry:
    """Return who was read, and the scores of a reading, each NAME with NAME_low and NAME_high."""
    model = reading.model
    entry: Entry = {}
    entry["model"] = f"{model.key} {model.label}"
    entry["mask"] = reading.mask
    entry["data"] = reading.data
    entry["seed"] = str(reading.seed)
    for site in (ENCODER, ADAPTER):
        if row := reading.row(site):
            entry |= _with_interval(site, value=row.value, low=row.low, high=row.high)
    best = reading.best_layer
    entry["best layer"] = site_name(reading.own[best.site])
    entry |= _with_interval(BEST, value=best.value, low=best.low, high=best.high)
    entry["is_best"] = is_shown_best(reading, view)
    beyond = {"value": best.minus_random, "low": best.minus_low, "high": best.minus_high}
    return entry | _with_interval(BEYOND, **beyond)


def entry_of_weights(run: ProbeRun, benchmarks: dict[str, Entry]) -> Entry:
    """Return what else is known of the weights that a run has read."""
    files = {}
    for name, digest in run.manifest["identity"]["model"].items():
        file = name.removeprefix("mllm")
        files[file.removeprefix("/")] = digest
    entry = {}
    accuracy = run.training.get("val/answer_accuracy")
    if accuracy is not None:
        entry["answers"] = accuracy
    weights = fingerprint(files)
    return entry | benchmarks.get(weights, {})


def fingerprint(files: dict[str, str]) -> str:
    """Return what `llava-bidir vqa` calls weights with these checksums."""
    return describe_digest(files).split()[-1]


def _with_interval(name: str, value: Any, low: Any, high: Any) -> Entry:
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def read_benchmarks(file: Path) -> dict[str, Entry]:
    """Return the scores of a table1.json by the fingerprint of the weights.

    Raises:
        UserError: The file cannot be read, or its rows do not tell two models apart.
    """
    content = read_json(file)
    benchmarks: dict[str, Entry] = {}
    names = []
    for model in content["models"]:
        names.append((model["encoder"], model["image_attention"]))
    for name, model in zip(names, content["models"], strict=True):
        if names.count(name) > 1:
            raise UserError(
                f"{file} has two models of {', '.join(name)}; give the table1.json of each"
            )
        encoder, mask = name
        scores: Entry = {}
        for row in content["rows"]:
            if row["encoder"] == encoder and row["image_attention"] == mask:
                scores |= _with_interval(
                    row["column"], value=row["value"], low=row["low"], high=row["high"]
                )
        benchmarks[model["fingerprint"]] = scores
    return benchmarks


def is_shown_best(reading: SiteReading, view: ReportView) -> bool:
    """Return whether a reading's best layer is shown to be better than that of each other model and mask beside it."""
    differences = view.differences_beside(reading)
    rivals = []
    for other in view.readings:
        is_same_model = other.model is reading.model
        is_same_mask = other.mask == reading.mask
        is_comparable = (
            other.task == reading.task and other.data == reading.data and other.seed == reading.seed
        )
        if is_comparable and is_same_mask != is_same_model:
            rivals.append(compare_readings(differences, reading, other))
    return bool(rivals) and all(rival.finding == BETTER for rival in rivals)


def round_entry(entry: Entry) -> Row:
    """Return a row for people: scores with their intervals, the best one marked."""
    row: dict[str, str | Score] = {}
    for name, value in entry.items():
        if isinstance(value, str):
            row[name] = value
        elif name != "is_best" and not name.endswith(("_low", "_high")):
            low = entry.get(f"{name}_low")
            high = entry.get(f"{name}_high")
            is_best = False
            if name == BEST:
                is_best = entry["is_best"]
            if name.startswith("MME"):  # sums of points
                row[name] = Score(f"{value:.0f}", f"[{low:.0f}, {high:.0f}]", is_best)
            else:
                text = number(value, has_sign=name == BEYOND)
                row[name] = Score(text, interval(low, high), is_best)
    return row
