"""The folder of a run: tensors of the run and of its analyses, and what a command says of a finished run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from llava_bidir.common.errors import UserError
from llava_bidir.common.files import read_json
from llava_bidir.common.processes import rank_zero_info
from llava_bidir.common.runs import RunFolder
from probes.tasks import SEGMENTATION, Task


@contextmanager
def open_tensors(path: Path) -> Iterator[safe_open]:
    """Open a safetensors file, whose tensors are read one by one.

    Raises:
        UserError: If the file is damaged; the message names it.
    """
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); make it again") from None


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file, see :func:`open_tensors`."""
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


# analyses check that they belong to the run's probes
RESULTS = (
    "predictions",
    "metrics.json",
    "manifest.json",
    "counts.safetensors",
    "effects.safetensors",
    "probes.safetensors",
)


def run_folder(out: Path) -> RunFolder:
    """Return the folder of a run of probes."""
    return RunFolder(
        path=out, result=out / "metrics.json", results=RESULTS, made_from=out / "manifest.json"
    )


def say_finished(out: Path, save_predictions: bool) -> None:
    """Say that the run is finished.

    Raises:
        UserError: It was made without predictions, which are wanted.
    """
    if save_predictions and not (out / "predictions").is_dir():
        raise UserError(
            f"{out} is finished without predictions, which are saved while probes are scored; make it again "
            "with --overwrite true, or in another --out"
        )
    rank_zero_info(f"{out / 'metrics.json'} exists: this run is finished; nothing to do")


def format_scores(out: Path, task: Task) -> str:
    """Return one line with the main scores of the finished run, and what choosing a validation adds to the best."""
    metrics = read_json(out / "metrics.json")
    summary = metrics["summary"]
    main = {site: summary[site] for site in ("encoder", "adapter")}
    main |= {summary["peak_site"]: summary["peak_llm"], "final_norm": summary["final_norm"]}
    number = ".3g"
    if task.name == SEGMENTATION:
        number = ".1%"
    scores = [f"{site} {value:{number}}" for site, value in main.items() if value is not None]
    text = f"{out}: {task.labels[task.score]} {', '.join(scores) or 'in metrics.json'}"
    entry = max(metrics["sites"], key=lambda entry: task.sign * entry[task.score])
    if "selection" not in entry:
        return text
    best, last, added = (
        f"{value:{number}}" for value in (entry[task.score], entry["last"], entry["selection"])
    )
    validations = len(entry["history"])
    return f"{text}; {entry['site']}: best of {validations} validations {best}, last {last}, difference {added}"
