"""Results of the comparison as files: results.md and curves.csv."""

import csv
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from cases import CASES
from compare import Training
from mutations import MUTATIONS, STEPS

PRECISIONS = ("float64", "float32", "bf16")
AGREEING = (
    "training",
    "batches that differ",
    "loss, nats (at most)",
    "LLaVA's bf16 there",
    "gradient norm",
    "weights (at most)",
)
DEVIATING = (
    "training",
    "deviation",
    "samples elsewhere",
    "batches with other labels",
    "largest loss",
    "last ten",
    "weights",
)
CHANGED = (
    "bug",
    "batches that differ",
    "largest loss",
    "gradient norm",
    "learning rate",
)


def write_report(
    folder: Path,
    runs: Path,
    cases: dict[str, dict],
    mutations: dict[str, dict],
) -> None:
    """Write all files.

    Args:
        folder: Where to.
        runs: Folder of the trainings.
        cases, mutations: Results of :func:`compare.compare` by name; complete.
    """
    trainings = {
        case.name: [Training.read(runs / case.folder / side) for side in ("theirs", "ours")]
        for case in CASES
        if case.name == f"stage {case.stage}, {case.precision}"
    }
    theirs, ours = (training.record for training in trainings["stage 1, float64"])
    agreeing = [agreement(case, cases[case.name]) for case in CASES if not case.why]
    deviating = [deviation(case, cases[case.name]) for case in CASES if case.why]
    changed = [change(mutation, mutations[mutation.name]) for mutation in MUTATIONS]
    text = f"""# LLaVA's own training, step by step

Written by `make test-llava WRITE=yes`; [README.md](README.md) says how to read it. All trainings have 200 steps and the
same learning rates.

llava-torch 1.2.2.post1: torch {theirs["torch"]}, transformers {theirs["transformers"]};
ours: torch {ours["torch"]}, transformers {ours["transformers"]}.

{table(AGREEING, agreeing)}

## Deviations

{table(DEVIATING, deviating)}

## Mutations

Over the first {STEPS} steps, in float64.

{table(CHANGED, changed)}
"""
    (folder / "results.md").write_text(text)
    write_curves(folder / "curves.csv", trainings)


def table(header: Iterable[str], rows: Iterable[Iterable]) -> str:
    """Return a table of Markdown; numbers have two digits."""
    rows = [[number(cell) if isinstance(cell, float) else str(cell) for cell in x] for x in rows]
    lines = [f"| {' | '.join(cells)} |" for cells in ([*header], *rows)]
    return "\n".join([lines[0], "|---" * len([*header]) + "|", *lines[1:]])


def number(value: float) -> str:
    """Return a difference with two digits."""
    return "0" if value == 0 else f"{value:.1e}"


def limited(value: float, most: float | None) -> str:
    """Return a difference with its limit, if it has one."""
    return number(value) if most is None else f"{number(value)} ({most:.0e})"


def agreement(case, result: dict) -> tuple:
    """Return the cells of what has to agree."""
    return (
        case.name,
        max(result["different_batches"].values()),
        limited(result["loss"], case.loss),
        result["rounding_there"] or "",
        result["grad_norm"],
        limited(max(result["weights"].values()), case.weights),
    )


def deviation(case, result: dict) -> tuple:
    """Return the cells of what differs on purpose."""
    return (
        case.name,
        case.why,
        result["samples_in_another_place"],
        result["different_batches"]["labels"],
        result["loss"],
        f"{result['loss_of_the_last']:+.1e}",
        max(result["weights"].values()),
    )


def change(mutation, result: dict) -> tuple:
    """Return the cells of a bug in a copy of our package."""
    return (
        mutation.name,
        max(result["different_batches"].values()),
        result["loss"],
        result["grad_norm"],
        result["lr"],
    )


def write_curves(file: Path, trainings: dict[str, list[Training]]) -> None:
    """Write the loss of each step of both programs, one row per stage and step."""
    header = ["stage", "step", "learning_rate"]
    header += [f"{side}_{p}" for p in PRECISIONS for side in ("llava", "llava_bidir")]
    with file.open("w", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(header)
        for stage in (1, 2):
            pairs = [trainings[f"stage {stage}, {p}"] for p in PRECISIONS]
            rates = pairs[0][0].steps("adapter")
            losses = np.array([training.losses() for pair in pairs for training in pair])
            for step, (rate, row) in enumerate(zip(rates, losses.T, strict=True), 1):
                writer.writerow([stage, step, f"{rate:.8g}", *(f"{loss:.8g}" for loss in row)])
