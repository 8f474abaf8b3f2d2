"""Results of the comparison as files: results.md, curves.csv and losses.png."""

import csv
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from cases import CASES
from compare import Training
from mutations import MUTATIONS, STEPS

COLOURS = {"float64": "#0072b2", "float32": "#d55e00", "bf16": "#009e73"}  # of Okabe and Ito
CURVES = [case for case in CASES if case.name == f"stage {case.stage}, {case.precision}"]


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
        case.name: (
            Training.read(runs / case.folder / "theirs"),
            Training.read(runs / case.folder / "ours"),
        )
        for case in CURVES
    }
    theirs, ours = trainings[CURVES[0].name]
    versions = [
        f"{side}: torch {record['torch']}, transformers {record['transformers']}"
        for side, record in (("llava-torch 1.2.2.post1", theirs.record), ("ours", ours.record))
    ]
    lines = [
        "# LLaVA's own training, step by step",
        "",
        "Written by `make test-llava WRITE=yes`; [README.md](README.md) says how to read it.",
        "",
        "; ".join(versions) + ".",
        "",
        *table_of_cases(cases),
        "",
        "## Deviations",
        "",
        *table_of_deviations(cases),
        "",
        "## Mutations",
        "",
        f"Over the first {STEPS} steps, in float64.",
        "",
        *table_of_mutations(mutations),
    ]
    (folder / "results.md").write_text("\n".join(lines) + "\n")
    write_curves(folder / "curves.csv", trainings)
    draw(folder / "losses.png", trainings)


def number(value: float) -> str:
    """Return a difference with two digits."""
    return "0" if value == 0 else f"{value:.1e}"


def table_of_cases(results: dict[str, dict]) -> list[str]:
    """Return the lines of the table of what has to agree."""
    lines = [
        "| training | steps | batches that differ | loss, nats | gradient norm | learning rate | weights |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        if not case.why:
            result = results[case.name]
            cells = [
                case.name,
                str(result["steps"]),
                str(max(result["different_batches"].values())),
                f"{number(result['loss'])} (at most {number(case.loss)})",
                number(result["grad_norm"]),
                number(result["lr"]),
                f"{number(max(result['weights'].values()))} (at most {number(case.weights)})",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def table_of_deviations(results: dict[str, dict]) -> list[str]:
    """Return the lines of the table of what differs on purpose."""
    lines = [
        "| training | deviation | samples elsewhere | batches with other labels | largest loss | last ten | weights |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        if case.why:
            result = results[case.name]
            cells = [
                case.name,
                case.why,
                str(result["samples_in_another_place"]),
                str(result["different_batches"]["labels"]),
                number(result["loss"]),
                f"{result['loss_of_the_last']:+.1e}",
                number(max(result["weights"].values())),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def table_of_mutations(results: dict[str, dict]) -> list[str]:
    """Return the lines of the table of bugs in copies of our package."""
    lines = [
        "| bug | training | batches that differ | largest loss | gradient norm | learning rate |",
        "|---|---|---|---|---|---|",
    ]
    for mutation in MUTATIONS:
        result = results[mutation.name]
        cells = [
            mutation.name,
            mutation.case,
            str(max(result["different_batches"].values())),
            number(result["loss"]),
            number(result["grad_norm"]),
            number(result["lr"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def write_curves(file: Path, trainings: dict[str, tuple[Training, Training]]) -> None:
    """Write the loss of each step of both programs, one row per stage and step."""
    precisions = list(COLOURS)
    header = ["stage", "step", "learning_rate"]
    header += [f"{side}_{p}" for p in precisions for side in ("llava", "llava_bidir")]
    with file.open("w", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(header)
        for stage in (1, 2):
            pairs = [trainings[f"stage {stage}, {p}"] for p in precisions]
            rates = pairs[0][0].steps("adapter")
            losses = np.array([training.losses() for pair in pairs for training in pair])
            for step, (rate, row) in enumerate(zip(rates, losses.T, strict=True), 1):
                writer.writerow([stage, step, f"{rate:.8g}", *(f"{loss:.8g}" for loss in row)])


def draw(file: Path, trainings: dict[str, tuple[Training, Training]]) -> None:
    """Draw the losses of each stage, and below them how far apart they are."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.5), sharex=True, sharey="row")
    for stage, (above, below) in zip((1, 2), axes.T, strict=True):
        theirs, ours = trainings[f"stage {stage}, float32"]
        steps = np.arange(1, len(theirs.losses()) + 1)
        above.plot(steps, theirs.losses(), color="0.7", linewidth=3, label="LLaVA")
        above.plot(steps, ours.losses(), color="black", linewidth=0.8, label="llava-bidir")
        above.set_title(f"Stage {stage}")
        for precision, colour in COLOURS.items():
            theirs, ours = trainings[f"stage {stage}, {precision}"]
            difference = np.abs(theirs.losses() - ours.losses()).clip(1e-16)
            below.semilogy(steps, difference, color=colour, linewidth=1, label=precision)
        below.set_xlabel("Step")
    axes[0, 0].set_ylabel("Loss, nats")
    axes[1, 0].set_ylabel("Difference, nats")
    axes[0, 0].legend(frameon=False)
    axes[1, 0].legend(frameon=False, ncols=3)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
