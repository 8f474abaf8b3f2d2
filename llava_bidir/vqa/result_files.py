"""What lies between the harness's environment and ours: pinned versions, and the files of a finished task."""

import hashlib
import json
import re
from pathlib import Path

from llava_bidir.common.atomic_io import atomic_write
from llava_bidir.common.errors import UserError

from .benchmarks import Item

PACKAGE = Path(__file__).parents[1]


class ItemError(Exception):
    """An item could not be answered."""


def pins() -> dict[str, str]:
    """The versions that the harness's environment must have; `make vqa-venv` installs them."""
    lines = (Path(__file__).parent / "requirements.txt").read_text().splitlines()
    return dict(line.partition("#")[0].strip().split("==") for line in lines if re.match(r"[\w.-]+==", line))


def code_digest() -> str:
    """Of all Python files of this package, so that two environments can tell whether they have the same."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(PACKAGE)).encode() + path.read_bytes())
    return digest.hexdigest()


def error_file(out: Path) -> Path:
    return out / "harness" / "error.txt"


def results_file(out: Path, name: str) -> Path:
    """It is there when the task is done."""
    return out / f"{name}.json"


def items_file(out: Path, name: str) -> Path:
    return out / f"{name}.jsonl"


def write_results(out: Path, name: str, facts: dict, items: list[Item]) -> None:
    with atomic_write(items_file(out, name)) as partial:
        partial.write_text("".join(json.dumps(item) + "\n" for item in items))
    with atomic_write(results_file(out, name)) as partial:
        partial.write_text(json.dumps(facts, indent=1) + "\n")


def read_results(out: Path, name: str) -> tuple[dict, list[Item]]:
    """Facts and items of a finished task.

    Raises:
        UserError: A file is not as :func:`write_results` left it.
    """
    try:
        facts = json.loads(results_file(out, name).read_text())
        items = [json.loads(line) for line in items_file(out, name).read_text().splitlines()]
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{results_file(out, name)}: {error}; delete it to have the task run again") from error
    return facts, items
