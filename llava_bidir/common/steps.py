"""Steps of long work: each is done once, and again if what it was made from has changed.

FOLDER/steps/NAME.json records of each step its command, hashes of what it read and wrote, its seconds and memory, or
why it has made nothing. Studies, the demo, the real model, calibrations and rehearsals are made of such steps.
"""

import resource
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .atomic_io import read_json, sha256, write_files
from .errors import NothingToMeasure, UserError

OUTCOMES = {"left_out": "left out", "failed": "failed"}  # by key of a record


@dataclass(frozen=True)
class Step:
    """A part of long work: one command with its result.

    Args:
        name: Unique among the steps of the work, e.g. "causal/random0/knockout".
        command: Words of the command.
        result: The file that says that it is done.
        kind: Steps of one kind take about the same time.
        reads: Files that it reads, by their names in the record.
        configs: Files that its options are read from, by name. With other content they are other options.
        takes_overwrite: The command refuses to replace a result without `--overwrite true`.
        follows: Step that it is compared with, and left out with.
        optional: If it fails, the steps after it run nevertheless.
        why_left_out: Known before any work; "" if it is run.
    """

    name: str
    command: tuple[str, ...]
    result: Path
    kind: str
    reads: Mapping[str, Path] = field(default_factory=dict)
    configs: Mapping[str, Path] = field(default_factory=dict)
    takes_overwrite: bool = False
    follows: str = ""
    optional: bool = False
    why_left_out: str = ""

    def inputs(self) -> dict[str, str | None]:
        """Return the hashes of what the step reads, None for a file that is not there."""
        return {name: digest(file) for name, file in self.reads.items()}

    def config_hashes(self) -> dict[str, str | None]:
        """Return the hashes of the files that the step's options are read from."""
        return {name: digest(file) for name, file in self.configs.items()}


def digest(file: Path) -> str | None:
    """Return the SHA-256 of a file, None if there is none."""
    return sha256(file) if file.is_file() else None


# ---------------------------------------------------------------------------------------------------- what is done
def read_record(name: str, folder: Path) -> dict[str, Any]:
    """Return the record of a step, {} if there is none."""
    file = _record_file(name, folder)
    return read_json(file) if file.is_file() else {}


def _record_file(name: str, folder: Path) -> Path:
    return folder / "steps" / f"{name.replace('/', '.')}.json"


def is_done(step: Step, folder: Path) -> bool:
    """Return whether this command, from what is there now, has made the result or had none to make."""
    record = read_record(step.name, folder)
    if step.why_left_out:
        return record.get("left_out") == step.why_left_out
    if record.get("failed"):
        return False
    if record.get("lacks"):  # an earlier plan left it out for a reason that is gone
        return False
    is_there = step.result.is_file() or bool(record.get("left_out"))
    # records of earlier versions have no configs
    known = {"configs": {}} | record
    return is_there and all(known.get(key) == value for key, value in _state(step).items())


def find_missing(
    steps: Sequence[Step],
    folder: Path,
    must_repeat: Callable[[Step], bool] | None = None,
) -> list[Step]:
    """Return the steps that are not done or read what other missing steps write.

    Args:
        steps: Each after those whose results it reads.
        folder: Folder of the records.
        must_repeat: Says whether a finished step is done again nevertheless.
    """
    missing: list[Step] = []
    for step in steps:
        written = {other.result for other in missing}
        again = bool(written & set(step.reads.values())) or (must_repeat and must_repeat(step))
        if again or not is_done(step, folder):
            missing.append(step)
    return missing


def _state(step: Step) -> dict[str, Any]:
    return {
        "command": list(step.command),
        "configs": step.config_hashes(),
        "inputs": step.inputs(),
        "result": digest(step.result),
    }


def _write_record(
    step: Step,
    folder: Path,
    before: Mapping[str, Any],
    seconds: float,
    more: Mapping[str, Any],
) -> None:
    """Write what a step has read and made, or under "left_out" or "failed" why it has made nothing.

    The inputs are those `before` it ran: what has changed since was not read.
    """
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # of this process so far
    record = {
        "step": step.name,
        "kind": step.kind,
        **before,
        "result": digest(step.result),
        "seconds": round(seconds, 1),
        "peak_gb": round(peak_gb, 2),
    }
    known_before = {"lacks": step.why_left_out} if step.why_left_out else {}
    write_files({_record_file(step.name, folder): record | known_before | more})


def command_now(
    step: Step,
    folder: Path,
    *,
    overwrite: bool = False,
) -> list[str]:
    """Return the words of a step's command; a result that it made from other inputs is replaced.

    Args:
        step: The step.
        folder: Folder of the records.
        overwrite: Replace any other result, too.
    """
    words = list(step.command)
    if not step.takes_overwrite or not step.result.is_file():
        return words
    if not (overwrite or _is_outdated(step, folder)):
        return words
    if "--ckpt_path" in words:  # to resume, which is the opposite
        start = words.index("--ckpt_path")
        words = words[:start] + words[start + 2 :]
    return [*words, "--overwrite", "true"]


def _is_outdated(step: Step, folder: Path) -> bool:
    """Return whether the result that is there was made by this command from other inputs."""
    made = _how_made(step, folder)
    same_options = made.get("command") == list(step.command)
    if not same_options or made.get("configs", {}) != step.config_hashes():
        return False
    return made["inputs"] != step.inputs()


def _how_made(step: Step, folder: Path) -> dict[str, Any]:
    """Return command, configs and inputs of the result that is there: a step that failed has not replaced it."""
    record = read_record(step.name, folder)
    if record.get("failed"):
        return record.get("kept", {})
    return {key: record[key] for key in ("command", "configs", "inputs") if key in record}


# ---------------------------------------------------------------------------------------------------- running
def run_steps(
    missing: Sequence[Step],
    folder: Path,
    run: Callable[[Step], Mapping[str, Any] | None],
    *,
    log: Path | None = None,
    overwrite: bool = False,
    after: Callable[[], None] | None = None,
) -> list[str]:
    """Run steps in order and record what became of each.

    Args:
        missing: Steps that are not done.
        folder: Folder of the records.
        run: Runs a step and returns what else its record keeps; "failed" is why an optional step has failed. A raised
            `NothingToMeasure` leaves the step out; any other error ends the work, unless the step is optional.
        log: File for tracebacks of optional steps.
        overwrite: Delete the earlier result of a step that is left out or fails.
        after: Called after each step that was run, when its record is written.

    Returns:
        What each optional step that failed has said.
    """
    failed: list[str] = []
    for i, step in enumerate(missing):
        if step.why_left_out:
            _leave_out(step, folder, step.why_left_out, overwrite)
            continue
        followed = read_record(step.follows, folder) if step.follows else {}
        if followed.get("left_out"):
            reason = f"so was {step.follows}, with which it is compared"
            _leave_out(step, folder, reason, overwrite)
            continue
        if followed.get("failed"):  # the next call tries both
            continue
        left = describe_time_left(missing[i:], folder)
        print(f"[{i + 1}/{len(missing)}] {step.name}{left and f', {left}'}", flush=True)
        started = time.perf_counter()
        before = _state(step)
        made = _how_made(step, folder)
        try:
            more = run(step) or {}
        except NothingToMeasure as error:
            print(f"left out: {error}", flush=True)
            _leave_out(step, folder, str(error), overwrite)
            continue
        except Exception as error:
            if not step.optional:
                raise
            more = {"failed": _describe_failure(step, error, log)}
        if "failed" in more:
            if overwrite:
                step.result.unlink(missing_ok=True)
            elif step.result.is_file():
                more = {**more, "kept": made}
            failed.append(f"{step.name}: {more['failed']}")
            print(f"failed: {failed[-1]}", flush=True)
        _write_record(step, folder, before, time.perf_counter() - started, more)
        if after is not None:
            after()
    return failed


def _leave_out(
    step: Step,
    folder: Path,
    reason: str,
    overwrite: bool,
) -> None:
    """Record that a step was left out; a result from other inputs than are there now would be none of this work."""
    if overwrite or _is_outdated(step, folder):
        step.result.unlink(missing_ok=True)
    _write_record(step, folder, _state(step), 0.0, {"left_out": reason})


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


def describe_time_left(steps: Sequence[Step], folder: Path) -> str:
    """Return the time that steps will take, as far as steps of their kind were timed; "" if none was."""
    seconds: dict[str, list[float]] = {}
    for file in (folder / "steps").glob("*.json"):
        record = read_json(file)
        if not any(record.get(key) for key in OUTCOMES):
            seconds.setdefault(record["kind"], []).append(record["seconds"])
    known = [
        sum(seconds[step.kind]) / len(seconds[step.kind]) for step in steps if step.kind in seconds
    ]
    return f"about {max(1, round(sum(known) / 60))} min left" if known else ""
