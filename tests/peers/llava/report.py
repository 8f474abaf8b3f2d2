"""Results of the comparison as a page, results.md."""

from pathlib import Path

from cases import CASES
from compare import Training
from mutations import MUTATIONS, STEPS


def write_report(
    folder: Path, runs: Path, cases: dict[str, dict], mutations: dict[str, dict]
) -> None:
    """Write the page.

    Args:
        folder: Where to.
        runs: Folder of the trainings.
        cases, mutations: Results of :func:`compare.compare` by name; complete.
    """
    theirs, ours = (
        Training.read(runs / CASES[0].folder / side).record for side in ("theirs", "ours")
    )
    agreeing = [agreement(case, cases[case.name]) for case in CASES if not case.why]
    deviating = [deviation(case, cases[case.name]) for case in CASES if case.why]
    changed = [change(mutation, mutations[mutation.name]) for mutation in MUTATIONS]
    text = f"""# LLaVA's own training, step by step

Written by `make test-llava WRITE=yes`; [README.md](README.md) says how to read it. All trainings have 200 steps and the
same learning rates.

llava-torch 1.2.2.post1: torch {theirs["torch"]}, transformers {theirs["transformers"]};
ours: torch {ours["torch"]}, transformers {ours["transformers"]}.

{table(agreeing)}

## Deviations

{table(deviating)}

## Mutations

Over the first {STEPS} steps, in float64.

{table(changed)}
"""
    (folder / "results.md").write_text(text)


def table(rows: list[dict]) -> str:
    """Return a table of Markdown from cells by column; numbers have two digits."""
    cells = [[number(x) if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
    header, *lines = (f"| {' | '.join(line)} |" for line in ([*rows[0]], *cells))
    return "\n".join([header, "|---" * len(rows[0]) + "|", *lines])


def number(value: float) -> str:
    """Return a difference with two digits."""
    return "0" if value == 0 else f"{value:.1e}"


def limited(value: float, most: float | None) -> str:
    """Return a difference with its limit, if it has one."""
    return number(value) if most is None else f"{number(value)} ({most:.0e})"


def agreement(case, result: dict) -> dict:
    """Return the cells of what has to agree."""
    return {
        "training": case.name,
        "batches that differ": max(result["different_batches"].values()),
        "loss, nats (at most)": limited(result["loss"], case.loss),
        "LLaVA's bf16 there": result["rounding_there"] or "",
        "gradient norm": result["grad_norm"],
        "weights (at most)": limited(max(result["weights"].values()), case.weights),
    }


def deviation(case, result: dict) -> dict:
    """Return the cells of what differs on purpose."""
    return {
        "training": case.name,
        "deviation": case.why,
        "samples elsewhere": result["samples_in_another_place"],
        "batches with other labels": result["different_batches"]["labels"],
        "largest loss": result["loss"],
        "last ten": f"{result['loss_of_the_last']:+.1e}",
        "weights": max(result["weights"].values()),
    }


def change(mutation, result: dict) -> dict:
    """Return the cells of a bug in a copy of our package."""
    return {
        "bug": mutation.name,
        "batches that differ": max(result["different_batches"].values()),
        "largest loss": result["loss"],
        "gradient norm": result["grad_norm"],
        "learning rate": result["lr"],
    }
