"""`llava-bidir status RUNS`: files, logs and Slurm's queue -> how far each step of each model is.

Names are those of `slurm/submit.sh`: the step MODEL/STEP has its files in RUNS/MODEL/STEP, its log in
RUNS/logs/MODEL-STEP.log, and the name RUNS/MODEL/STEP in the queue. Its job begins the log of each try with
"job ID, restart N", and ends it with "done".
"""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from llava_bidir.command_options import StatusOptions
from llava_bidir.common.errors import UserError
from llava_bidir.common.files import is_in_use, read_json
from llava_bidir.common.progress import PROGRESS, StepProgress

STAGES = ("stage1", "stage2")
STEPS = (*STAGES, "study", "vqa", "report")
TRY = re.compile(r"^job \S+, restart (\d+)$", re.MULTILINE)
STUDY_STEP = re.compile(r"^\[(\d+)/(\d+)\]", re.MULTILINE)
MINUTES_LEFT = re.compile(r"(\d+) min left")
# what commands, Python and Slurm say at the end; what follows in a log tells less
ERROR = re.compile(
    r"^(?:\[rank\d+\]: )?(?:llava-bidir: |probes: |[\w.]+(?:Error|Exception)\b|slurmstepd: .*(?:DUE TO|oom)).*",
    re.MULTILINE,
)


@dataclass(frozen=True, kw_only=True)
class StepStatus(StepProgress):
    """Where a step of a model stands.

    Args:
        model: Name of the model's folder.
        step: stage1, stage2, study, vqa, or report of an encoder's study.
        state: waiting, running, done, or failed, also if it has ended without a result.
        requeues: How often its job was requeued.
        reason: Why it waits or has failed.
    """

    model: str
    step: str
    state: str
    requeues: int
    reason: str


class QueuedJob(NamedTuple):
    """State of a job in Slurm's queue, and why it waits."""

    state: str
    reason: str


def run(options: StatusOptions) -> None:
    """Run `llava-bidir status`.

    Raises:
        UserError: There are no runs.
    """
    rows = read_status(options.runs)
    if not rows:
        raise UserError(
            f"{options.runs} has no runs; expected MODEL/stage1, MODEL/vqa, a study, or logs of slurm/submit.sh"
        )
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    width = max(len(row.model) for row in rows)
    print(f"{'model':<{width}}  step    state    progress")
    for row in rows:
        progress = ", ".join(describe(row))
        print(f"{row.model:<{width}}  {row.step:<6}  {row.state:<7}  {progress}".rstrip())


def describe(row: StepStatus) -> Iterator[str]:
    """Yield what is known of a step, for people."""
    if row.of is not None:
        yield f"{row.done:,} of {row.of:,}"
    elif row.done is not None:
        yield f"{row.done:,} done"
    if row.loss is not None:
        yield f"loss {row.loss:.3g}"
    if row.state == "running":
        if row.samples_per_s is not None:
            yield f"{row.samples_per_s:.3g} samples/s"
        if row.left_s is not None:
            yield f"{row.left_s / 3600:.1f} h left"
    if row.requeues:
        yield f"requeues: {row.requeues}"
    if row.reason:
        yield row.reason


def read_status(runs: Path) -> list[StepStatus]:
    """Return the status of each step of each model in a folder, by model."""
    queue = read_queue(runs)
    logs = {"/".join(log.stem.rsplit("-", 1)): log for log in (runs / "logs").glob("*-*.log")}
    names = {*(queue or ()), *logs}
    names |= steps_of_folders(runs, studies={x for x in names if x.endswith("/study")})
    by_model = []
    for name in names:
        model, *steps = name.split("/")
        if len(steps) == 1 and steps[0] in STEPS:
            by_model.append((model, STEPS.index(steps[0]), name))
    return [
        status_of(runs, name=name, log=logs.get(name), queue=queue)
        for _, _, name in sorted(by_model)
    ]


def steps_of_folders(runs: Path, studies: set[str]) -> set[str]:
    """Return the steps MODEL/STEP that have a folder; a folder of which studies are parts is their report."""
    encoders = {study.rpartition("-")[0] for study in studies}
    names = set()
    for folder in runs.glob("*/"):
        if any((folder / stage).is_dir() for stage in STAGES):
            names |= {f"{folder.name}/{stage}" for stage in STAGES}
        if (folder / "vqa").is_dir():
            names.add(f"{folder.name}/vqa")
        if (folder / "steps").is_dir():
            step = "study"
            if folder.name in encoders:
                step = "report"
            names.add(f"{folder.name}/{step}")
    return names


def read_queue(runs: Path) -> dict[str, QueuedJob] | None:
    """Return state and reason of the folder's jobs in Slurm's queue by MODEL/STEP, None without Slurm.

    Raises:
        UserError: Slurm does not answer.
    """
    if not shutil.which("squeue"):
        return None
    # state, reason, folder in which it was submitted, name
    asked = subprocess.run(
        ["squeue", "--noheader", "--format=%T|%r|%Z|%j"], capture_output=True, text=True
    )
    if asked.returncode:
        raise UserError(f"squeue does not answer: {asked.stderr.strip()}")
    jobs: dict[str, QueuedJob] = {}
    for line in asked.stdout.splitlines():
        state, reason, folder, name = line.split("|", 3)
        path = Path(folder, name).resolve()
        if path.is_relative_to(runs.resolve()):
            name = path.relative_to(runs.resolve()).as_posix()
            if name not in jobs or state != "PENDING":  # of two of a name, one waits for the other
                jobs[name] = QueuedJob(state, reason)
    return jobs


def status_of(
    runs: Path, name: str, log: Path | None, queue: Mapping[str, QueuedJob] | None
) -> StepStatus:
    """Return the status of a step; see the head of this file for `name`."""
    model, step = name.split("/")
    text, requeues = read_last_try(log)
    progress = read_progress(runs / model, step=step, text=text)
    has_begun = progress != StepProgress() or (runs / name / "config.yaml").exists()
    folder = runs / name
    if not folder.is_dir():
        folder = runs / model
    job = (queue or {}).get(name)
    state = "waiting"
    reason = ""
    if is_done(runs, model=model, step=step) or text.endswith("\ndone\n"):
        state = "done"
        if progress.of is not None:
            progress = replace(progress, done=progress.of, left_s=0.0)
    elif job and job.state == "PENDING":
        reason = job.reason
    elif job or is_in_use(folder):
        state = "running"
    elif log or has_begun:
        state = "failed"
        reason = why_failed(text)
    elif queue is not None:
        reason = "not in the queue"
    return StepStatus(
        model=model, step=step, state=state, requeues=requeues, reason=reason, **vars(progress)
    )


def is_done(runs: Path, model: str, step: str) -> bool:
    """Return whether a step has its result; that of a study of one mask is the encoder's report."""
    encoder = model.rpartition("-")[0] or model
    report = "report/results.json"
    results = {
        "study": [f"{model}/{report}", f"{encoder}/{report}"],
        "report": [f"{model}/{report}"],
        "vqa": [f"{model}/vqa/table1.json"],
    }
    return any((runs / name).exists() for name in results.get(step, [f"{model}/{step}/hf"]))


def read_last_try(log: Path | None) -> tuple[str, int]:
    """Return what a job has said since it was last started, and how often it was requeued."""
    if log is None:
        return "", 0
    text = log.read_text(errors="replace")  # of a bar, each drawing is a line
    tries = [*TRY.finditer(text)]
    if not tries:
        return text, 0
    return text[tries[-1].end() :], int(tries[-1][1])


def read_progress(folder: Path, step: str, text: str) -> StepProgress:
    """Return how far a step of the model in a folder is; `text` is from its log."""
    if step in STAGES:
        file = folder / step / PROGRESS
        if file.is_file():
            # a later version may write more
            content = read_json(file)
            names = content.keys() & StepProgress.__dataclass_fields__.keys()
            return StepProgress(**{key: content[key] for key in names})
    elif step == "vqa":
        results = [file for file in (folder / "vqa").glob("*.json") if file.stem != "table1"]
        return StepProgress(done=len(results) or None)
    elif steps := STUDY_STEP.findall(text):
        begun, count = steps[-1]
        left_s = None
        for minutes in MINUTES_LEFT.findall(text)[-1:]:
            left_s = 60.0 * int(minutes)
        return StepProgress(done=int(begun) - 1, of=int(count), left_s=left_s)
    elif step == "study":
        records = [*folder.glob("steps/*.json")]
        return StepProgress(done=len(records) or None)
    return StepProgress()


def why_failed(text: str) -> str:
    """Return that a job has no result, with the line of its log that says why."""
    lines = ERROR.findall(text) or text.split("\n")
    last = [line for line in lines if line.strip()][-1:]
    told = "; ".join(["ended without a result", *last])
    return "".join(filter(str.isprintable, told))
