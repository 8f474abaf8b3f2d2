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

PRECISIONS = ("float64", "float32", "bf16")
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


def limited(value: float, most: float | None) -> str:
    """Return a difference with its limit, if it has one."""
    return number(value) if most is None else f"{number(value)} (at most {most:.0e})"


def rounding(result: dict) -> str:
    """Return what LLaVA's own rounding changes at the step that differs most, if it was measured."""
    there = result["rounding_there"]
    return f"; LLaVA's own bf16 there {number(there)}" if there else ""


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
                limited(result["loss"], case.loss) + rounding(result),
                number(result["grad_norm"]),
                number(result["lr"]),
                limited(max(result["weights"].values()), case.weights),
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


def draw(file: Path, trainings: dict[str, tuple[Training, Training]]) -> None:
    """Draw the losses of each stage, and below them how far apart they are."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.5), sharex=True, sharey="row")
    for stage, (above, below) in zip((1, 2), axes.T, strict=True):
        losses = {
            precision: [training.losses() for training in trainings[f"stage {stage}, {precision}"]]
            for precision in PRECISIONS
        }
        theirs, ours = losses["float64"]
        steps = np.arange(1, len(theirs) + 1)
        above.plot(steps, theirs, color="0.7", linewidth=3, label="LLaVA")
        above.plot(steps, ours, color="black", linewidth=0.8, label="llava-bidir")
        above.set_title(f"Stage {stage}")
        for label, colour, (first, second) in (
            ("LLaVA's bf16 to its float64", "0.6", (theirs, losses["bf16"][0])),
            ("ours bf16-mixed to LLaVA's float64", "#009e73", (theirs, losses["bf16"][1])),
            ("float32", "#d55e00", losses["float32"]),
            ("float64", "#0072b2", losses["float64"]),
        ):
            difference = np.abs(first - second).clip(1e-16)
            below.semilogy(steps, difference, color=colour, linewidth=1, label=label)
        below.set_xlabel("Step")
    axes[0, 0].set_ylabel("Loss, nats")
    axes[1, 0].set_ylabel("Difference, nats")
    axes[0, 0].legend(frameon=False)
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(file, dpi=85)
    plt.close(figure)
