"""Read what is known about a world or a model: whether the effect of a claim was planted or is absent.

DATA/truth.json and CHECKPOINT/truth.json are objects {claim: "planted" or "absent"}; the checkpoint wins.
"""

from collections.abc import Iterable
from pathlib import Path

from llava_bidir.common.atomic_io import read_json
from llava_bidir.common.errors import UserError
from probes.results.probe_run import ProbeRun

FILE, TRUTHS = "truth.json", ("planted", "absent")
OTHER_CLAIMS = ("answers", "depth")  # which a report does not judge


def read_truth(run: ProbeRun, claims: Iterable[str]) -> dict[str, str]:
    """Return the truth about each claim that the run's data or checkpoint record; {} for those that do not.

    Raises:
        UserError: A file has another claim or value.
    """
    truth: dict[str, str] = {}
    for folder in (run.manifest["data"]["root"], run.metrics["mllm"]):
        file = Path(folder) / FILE
        found = read_json(file) if file.is_file() else {}
        for claim, value in found.items():
            if claim not in (known := (*claims, *OTHER_CLAIMS)):
                raise UserError(f"{file}: there is no claim {claim!r}; expected one of {', '.join(known)}")
            if value not in TRUTHS:
                raise UserError(f"{file}: {claim} must be {' or '.join(TRUTHS)}, got {value!r}")
        truth |= found
    return truth
