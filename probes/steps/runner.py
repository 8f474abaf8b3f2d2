"""Steps of long work: each is done once, and again if what it was made from has changed.

FOLDER/steps/NAME.json records of each step its config, hashes of what it read and wrote, and its seconds, or why
it has made nothing. Studies, the demo and experiments are made of such steps.
"""

import os
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from llava_bidir.common.errors import NothingToMeasure, UserError
from llava_bidir.common.files import read_json, sha256, write_files
from llava_bidir.common.identity import compared_settings

from .progress import StepWatcher, output_of_command, watched

LEFT_OUT = "left out"
FAILED = "failed"
OUTCOMES = {"left_out": LEFT_OUT, "failed": FAILED}  # by key of a record


@dataclass(frozen=True)
class Step:
    """A part of long work: one call with its result.

    Args:
        name: Unique among the steps of the work, e.g. "causal/random0/knockout".
        config: All that the call is given: a dataclass of options, or the words of a command.
        result: The file that says that it is done.
        kind: Steps of one kind take about the same time.
        call: "module:function", which takes the config; "" of a command.
        reads: Files that it reads, by their names in the record.
        takes_overwrite: The call refuses to replace a result unless it is told to overwrite it.
        follows: Step that it is compared with, and left out with.
        optional: If it fails, the steps after it run nevertheless.
        why_left_out: Known before any work; "" if it is run.
    """

    name: str
    config: Any
    result: Path
    kind: str
    call: str = ""
    reads: Mapping[str, Path] = field(default_factory=dict)
    takes_overwrite: bool = False
    follows: str = ""
    optional: bool = False
    why_left_out: str = ""

    def inputs(self) -> dict[str, str | None]:
        """Return the hashes of what the step reads, None for a file that is not there."""
        return {name: digest(file) for name, file in self.reads.items()}


def digest(file: Path) -> str | None:
    """Return the SHA-256 of a file, None if there is none."""
    return sha256(file) if file.is_file() else None


# ---------------------------------------------------------------------------------------------------- what is done
def read_record(name: str, folder: Path) -> dict[str, Any]:
    """Return the record of a step, {} if there is none."""
    file = record_file(name, folder)
    return read_json(file) if file.is_file() else {}


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of all steps, in the order of their names."""
    return [read_json(file) for file in sorted((folder / "steps").glob("*.json"))]


def record_file(name: str, folder: Path) -> Path:
    """Return the file of a step's record."""
    return folder / "steps" / f"{name.replace('/', '.')}.json"


def why_missing(step: Step, folder: Path) -> str | None:
    """Return None if this call, from what is there now, has made the result or had none to make.

    Else return what has changed since it was last done, "" if it was not done before.
    """
    record = read_record(step.name, folder)
    if step.why_left_out:
        return None if record.get("left_out") == step.why_left_out else ""
    if not record:
        return ""
    if record.get("failed"):
        return "it has failed"
    if record.get("lacks"):  # an earlier plan left it out for a reason that is gone
        return f"the reason is gone that it was left out for: {record['lacks']}"
    if not step.result.is_file() and not record.get("left_out"):
        return f"{step.result} is gone"
    now = _state(step, folder)
    before, config = compared(record["config"]), compared(now["config"])
    if before != config:
        name = first_changed(before, config)
        return f"{name} was {before.get(name)}, and is {config.get(name)}"
    if record["inputs"] != now["inputs"]:
        return f"{first_changed(record['inputs'], now['inputs'])} has changed"
    return None if record["result"] == now["result"] else f"{step.result} has changed"


def compared(config: Any) -> dict[str, Any]:
    """Return what is compared of a config."""
    settings = config if isinstance(config, dict) else {"a setting": config}
    return compared_settings(settings)


def first_changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the first key whose value differs."""
    return next(key for key in {**before, **now} if before.get(key, ...) != now.get(key, ...))


def unfinished_steps(folder: str | Path) -> list[dict[str, str]]:
    """Return {"step", "outcome", "reason"} of each step that has no result, in the order of their names."""
    return [
        {"step": record["step"], "outcome": outcome, "reason": record[key]}
        for record in read_records(Path(folder))
        for key, outcome in OUTCOMES.items()
        if record.get(key)
    ]


def describe_steps(unfinished: Iterable[dict[str, str]], outcome: str) -> list[str]:
    """Return a line for each reason of the steps of :func:`unfinished_steps` with an outcome, LEFT_OUT or FAILED.

    What failed must be looked at, and is said first; what was left out had nothing to measure, and is said last.
    """
    steps: dict[str, list[str]] = {}
    for entry in unfinished:
        if entry["outcome"] == outcome:
            steps.setdefault(entry["reason"], []).append(entry["step"])
    return [f"{', '.join(names)} {outcome}: {reason}" for reason, names in steps.items()]


def find_missing(steps: Sequence[Step], folder: Path) -> list[Step]:
    """Return the steps that are not done or read what other missing steps write; print why one is done again.

    Args:
        steps: Each after those whose results it reads.
        folder: Folder of the records.
    """
    missing: list[Step] = []
    written: dict[Path, str] = {}
    for step in steps:
        why = why_missing(step, folder)
        if why is None:
            read = next((written[file] for file in step.reads.values() if file in written), "")
            if not read:
                continue
            why = f"it reads the result of {read}"
        missing.append(step)
        written[step.result] = step.name
        if why:
            print(f"{step.name} again: {why}", flush=True)
    return missing


def _state(step: Step, folder: Path) -> dict[str, Any]:
    return {
        "config": as_json(step.config, folder),
        "inputs": step.inputs(),
        "result": digest(step.result),
    }


def as_json(value: Any, folder: Path) -> Any:
    """Return a value as a record has it after it was read back: dataclasses are objects, and paths are text.

    Paths in `folder` and beside it are relative to it, so that records are true wherever the work is moved or copied.
    """
    if is_dataclass(value):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): as_json(of_key, folder) for key, of_key in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item, folder) for item in value]
    if value is None or isinstance(value, int | float):
        return value
    text = str(value)
    for base in (folder, folder.resolve()):
        beside = base.parent if base.parent.name else base
        if text == str(base) or text.startswith(f"{beside}{os.sep}"):
            return os.path.relpath(text, base)
    return text


def _write_record(
    step: Step, folder: Path, before: Mapping[str, Any], seconds: float, more: Mapping[str, Any]
) -> None:
    """Write what a step has read and made, or under "left_out" or "failed" why it has made nothing.

    The inputs are those `before` it ran: what has changed since was not read.
    """
    record = {
        "step": step.name,
        "kind": step.kind,
        **before,
        "result": digest(step.result),
        "seconds": round(seconds, 1),
    }
    write_files({record_file(step.name, folder): record | more})


def must_replace(step: Step, folder: Path, *, overwrite: bool = False) -> bool:
    """Return whether a step is told to overwrite the result that is there: it has made it from other inputs.

    Args:
        step: The step.
        folder: Folder of the records.
        overwrite: Replace any other result, too.
    """
    is_there = step.takes_overwrite and step.result.is_file()
    return is_there and (overwrite or _is_outdated(step, folder))


def command_now(step: Step, folder: Path) -> list[str]:
    """Return the words of a step that is a command; a result that it has made from other inputs is replaced."""
    words = list(step.config)
    if not must_replace(step, folder):
        return words
    if "--ckpt_path" in words:  # to resume, which is the opposite
        start = words.index("--ckpt_path")
        words = words[:start] + words[start + 2 :]
    return [*words, "--overwrite", "true"]


def _is_outdated(step: Step, folder: Path) -> bool:
    """Return whether the result that is there was made by this call from other inputs."""
    made = _how_made(step, folder)
    is_this_call = compared(made.get("config")) == compared(as_json(step.config, folder))
    return is_this_call and made["inputs"] != step.inputs()


def _how_made(step: Step, folder: Path) -> dict[str, Any]:
    """Return config and inputs of the result that is there: a step that failed has not replaced it."""
    record = read_record(step.name, folder)
    made = record.get("kept", record)
    return {key: made[key] for key in ("config", "inputs") if key in made}


# ---------------------------------------------------------------------------------------------------- running
def run_steps(
    missing: Sequence[Step],
    folder: Path,
    run: Callable[[Step], None],
    *,
    log: Path | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Run steps in order and record what became of each.

    Args:
        missing: Steps that are not done.
        folder: Folder of the records.
        run: Runs a step. A raised `NothingToMeasure` leaves it out; any other error ends the work, unless the step is
            optional.
        log: File for tracebacks of optional steps.
        overwrite: Delete the earlier result of a step that is left out or fails.

    Returns:
        What each optional step that failed has said.
    """
    failed: list[str] = []
    for i, step in enumerate(missing):
        reason = step.why_left_out
        followed = read_record(step.follows, folder)
        if not reason and followed.get("left_out"):
            reason = f"so was {step.follows}, with which it is compared"
        if reason:
            _leave_out(step, folder=folder, reason=reason, overwrite=overwrite)
            continue
        if followed.get("failed"):  # the next call tries both
            continue
        later = [other.kind for other in missing[i + 1 :]]
        watcher = StepWatcher(
            name=step.name, kind=step.kind, later=later, seconds=_mean_seconds(folder)
        )
        said = f"[{i + 1}/{len(missing)}] {step.name}", watcher.describe_left()
        print(", ".join(filter(None, said)), flush=True)
        started = time.perf_counter()
        before = _state(step, folder)
        made = _how_made(step, folder)
        more: dict[str, Any] = {}
        try:
            with output_of_command() as watcher.lines, watched(watcher):
                run(step)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None  # without the advice to resume a run of its own
        except NothingToMeasure as error:
            print(f"left out: {error}", flush=True)
            _leave_out(step, folder=folder, reason=str(error), overwrite=overwrite)
            continue
        except Exception as error:
            if not step.optional:
                raise
            more["failed"] = _describe_failure(step, error, log)
            if overwrite:
                step.result.unlink(missing_ok=True)
            more["kept"] = made if step.result.is_file() else {}
            failed.append(f"{step.name}: {more['failed']}")
            print(f"failed: {failed[-1]}", flush=True)
        _write_record(
            step, folder=folder, before=before, seconds=time.perf_counter() - started, more=more
        )
    return failed


def _leave_out(step: Step, folder: Path, reason: str, overwrite: bool) -> None:
    """Record that a step was left out; a result from other inputs than are there now would be none of this work."""
    if overwrite or _is_outdated(step, folder):
        step.result.unlink(missing_ok=True)
    more = {"left_out": reason, "lacks": step.why_left_out}
    _write_record(step, folder=folder, before=_state(step, folder), seconds=0.0, more=more)


def _describe_failure(step: Step, error: Exception, log: Path | None) -> str:
    """Return what a step that failed has said; the traceback of a bug goes to the log."""
    if isinstance(error, UserError):
        return str(error).removeprefix(f"{step.name}: ")
    text = f"{type(error).__name__}: {error}"
    if log is None:
        return text
    with log.open("a") as stream:
        traceback.print_exception(error, file=stream)
    return f"{text} (traceback in {log})"


def _mean_seconds(folder: Path) -> dict[str, float]:
    """Return the mean seconds of the steps that were timed, by kind."""
    seconds: dict[str, list[float]] = {}
    for record in read_records(folder):
        if not any(record.get(key) for key in OUTCOMES):
            seconds.setdefault(record["kind"], []).append(record["seconds"])
    return {kind: sum(values) / len(values) for kind, values in seconds.items()}
