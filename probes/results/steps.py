"""Steps of a study that were left out or have failed, as DIR/steps/*.json say; the report names them."""

from pathlib import Path

from llava_bidir.common.atomic_io import read_json

OUTCOMES = {"left_out": "left out", "failed": "failed"}  # by key of a record


def unfinished_steps(folder: str | Path) -> list[dict[str, str]]:
    """Return {"step", "outcome", "reason"} of each step of a study that has no result, in the order of their names."""
    found = []
    for file in sorted((Path(folder) / "steps").glob("*.json")):
        record = read_json(file)
        for key, outcome in OUTCOMES.items():
            if record.get(key):
                found.append(
                    {
                        "step": record["step"],
                        "outcome": outcome,
                        "reason": record[key],
                    }
                )
    return found


def study_folder(run: Path) -> Path | None:
    """Return the folder of the study that a run DIR/ARM or DIR/MODEL/ARM belongs to; None if it was made by itself."""
    for folder in (run.parent, run.parent.parent):
        name = ".".join(run.relative_to(folder).parts)
        if (folder / "steps" / f"{name}.json").is_file():
            return folder
    return None


def describe_step(entry: dict[str, str]) -> str:
    """Return one line about a step of :func:`unfinished_steps`."""
    return f"{entry['step']} {entry['outcome']}: {entry['reason']}"
