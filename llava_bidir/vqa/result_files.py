"""Files shared by the harness's environment and ours: pinned versions, and the results of a task.

A finished task has TASK.json with its scores and settings, and TASK.jsonl with one line per item.
"""

import hashlib
import json
import os
import re
from pathlib import Path

from llava_bidir.common.atomic_io import write_files
from llava_bidir.common.errors import UserError
from llava_bidir.common.identity import checksums, describe

from .scores import Item

PACKAGE = Path(__file__).parents[1]


class ItemError(Exception):
    """Error for an item that could not be answered."""


def pinned_versions() -> dict[str, str]:
    """Return the versions that `make vqa-venv` installs, by package."""
    lines = (Path(__file__).parent / "requirements.txt").read_text().splitlines()
    return dict(line.partition("#")[0].strip().split("==") for line in lines if re.match(r"[\w.-]+==", line))


def version_mismatches(versions: dict[str, str]) -> str:
    """Return e.g. "lmms_eval 0.7.2 instead of 0.7.3", "" if all pins match. Local parts ("+cu130") are ignored."""
    return ", ".join(
        f"{package} {versions.get(package)} instead of {pinned}"
        for package, pinned in pinned_versions().items()
        if versions.get(package, "").partition("+")[0] != pinned
    )


def code_digest() -> str:
    """Return the SHA-256 of this package's Python files, to detect another version in the harness's environment."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(PACKAGE)).encode() + path.read_bytes())
    return digest.hexdigest()


def dataset_digest(folder: Path, paths: list[str]) -> str:
    """Return the digest of local data: of the files, and of all files in the folders, among `paths` in `folder`."""
    inside = [
        os.path.join(parent, name)
        for path in paths
        for parent, _, names in os.walk(folder / path, followlinks=True)  # rglob follows no links in Python 3.11
        for name in names
    ]
    files = [str(folder / path) for path in paths if (folder / path).is_file()] + inside
    return describe(checksums(folder, sorted(os.path.relpath(file, folder) for file in files)), len(files))


def error_file(out: Path) -> Path:
    """Return the path of the harness's error message."""
    return out / "harness" / "error.txt"


def results_file(out: Path, name: str) -> Path:
    """Return the path of a task's scores. The file exists if and only if the task is finished."""
    return out / f"{name}.json"


def items_file(out: Path, name: str) -> Path:
    """Return the path of a task's items."""
    return out / f"{name}.jsonl"


def write_results(out: Path, name: str, info: dict, items: list[Item]) -> None:
    """Write both files of a finished task."""
    lines = "".join(json.dumps(item) + "\n" for item in items)
    write_files({items_file(out, name): lines, results_file(out, name): info})


def read_results(out: Path, name: str) -> tuple[dict, list[Item]]:
    """Return the info and the items of a finished task.

    Raises:
        UserError: A file is missing or is not valid JSON.
    """
    try:
        info = json.loads(results_file(out, name).read_text())
        items = [json.loads(line) for line in items_file(out, name).read_text().splitlines()]
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{results_file(out, name)}: {error}; delete it to run the task again") from error
    return info, items
