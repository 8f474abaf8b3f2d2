"""Refuse to replace the result of an analysis by that of other options or runs, unless the user asks for it."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llava_bidir.common.errors import UserError
from llava_bidir.common.files import read_json

ADVICE = "--overwrite true replaces it, --out DIR writes elsewhere"


def check_replaceable(
    path: Path,
    made_from: Mapping[str, Any],
    overwrite: bool,
    settings_of: Callable[[dict[str, Any]], Mapping[str, Any]] = lambda results: results,
) -> None:
    """Raise a UserError if a finished result was made with other options or from other runs.

    The same command can be run again, since its result is the same.

    Args:
        path: The result, a .json file; it need not exist.
        made_from: Options and fingerprints of the runs that the new result is made from.
        overwrite: Replace the result in any case.
        settings_of: Returns from the old result what `made_from` is compared with.
    """
    if overwrite or not path.is_file():
        return
    found = settings_of(read_json(path))
    for key, value in json.loads(json.dumps(made_from)).items():
        if found.get(key) != value:
            what = (
                "from other runs" if key == "runs" else f"with {key} {json.dumps(found.get(key))}"
            )
            raise UserError(f"{path} is finished and was made {what}; {ADVICE}")
