"""Read what is known about a world or a model: whether the effect of a claim was planted or is absent.

DATA/truth.json is {claim: "planted" or "absent"}. A checkpoint's training.json has the same under "truth", by the name
of the folder of images, since what is true of a model depends on what it sees. It wins over that of the data.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava_bidir.common.errors import UserError
from llava_bidir.common.files import read_json
from llava_bidir.common.imports import HINT
from probes.runs.finished_run import FinishedRun

FILE = "truth.json"
TRUTHS = ("planted", "absent")
OTHER_CLAIMS = ("answers", "depth")  # which a report does not judge


def read_truth(run: FinishedRun, claims: Iterable[str]) -> dict[str, str]:
    """Return the truth about each claim that the run's data or checkpoint record; {} for those that do not.

    Raises:
        UserError: One of them has another claim or value.
    """
    data = Path(run.manifest["data"]["root"])
    file = data / FILE
    of_data = _check(read_json(file), str(file), claims) if file.is_file() else {}
    of_model = run.training.get("truth", {}).get(data.name, {})
    return of_data | _check(of_model, f"{run.path / 'manifest.json'}: mllm_training.truth", claims)


def _check(truth: dict[str, Any], source: str, claims: Iterable[str]) -> dict[str, str]:
    known = (*claims, *OTHER_CLAIMS)
    for claim, value in truth.items():
        if claim not in known:
            raise UserError(
                f"{source}: there is no claim {claim!r}; expected one of {', '.join(known)}; {HINT}"
            )
        if value not in TRUTHS:
            raise UserError(f"{source}: {claim} must be {' or '.join(TRUTHS)}, got {value!r}")
    return truth
