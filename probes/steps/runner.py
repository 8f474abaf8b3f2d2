"""Find the steps that are missing, run them in order, and record what became of each."""

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava_bidir.common.errors import NothingToMeasure, UserError
from llava_bidir.common.identity import compared_settings

from .progress import StepWatcher, output_of_command, watched
from .record import (
    Outcome,
    Step,
    StepRecord,
    digest,
    outcome_of_left_out,
    read_record,
    read_records,
)


# ---------------------------------------------------------------------------------------------------- what is missing
def find_missing(steps: Sequence[Step], folder: Path) -> list[Step]:
    """Return the steps that are not done or read what other missing steps write; print why one is done again.

    Args:
        steps: Each after those whose results it reads.
        folder: Folder of the records.
    """
    missing: list[Step] = []
    writers: dict[Path, str] = {}  # names of missing steps by their results
    for step in steps:
        is_done, change = check_freshness(step, folder)
        if is_done:
            writers_read = [writers[file] for file in step.reads.values() if file in writers]
            if not writers_read:
                continue
            change = f"it reads the result of {writers_read[0]}"
        missing.append(step)
        writers[step.result] = step.name
        if change:
            print(f"{step.name} again: {change}", flush=True)
    return missing


class Freshness(NamedTuple):
    """Whether a step is done.

    Args:
        is_done: This call, from what is there now, has made the result or had none to make.
        change: What has changed since it was last done; "" if nothing has, or if it was not done before.
    """

    is_done: bool
    change: str = ""


def check_freshness(step: Step, folder: Path) -> Freshness:
    """Return whether a step is done, and else what has changed since it was."""
    record = read_record(step.name, folder)
    if record is None:
        return Freshness(is_done=False)
    if step.why_left_out:
        return Freshness(is_done=record.reason == step.why_left_out)
    change = describe_change(step, record, folder)
    return Freshness(is_done=not change, change=change)


def describe_change(step: Step, record: StepRecord, folder: Path) -> str:
    """Return what has changed since a step was recorded, "" if nothing has."""
    if record.outcome is Outcome.FAILED:
        return "it has failed"
    if record.is_planned:  # an earlier plan left it out
        return f"the reason is gone that it was left out for: {record.reason}"
    if record.outcome is Outcome.DONE and not step.result.is_file():
        return f"{step.result} is gone"
    now = step.made_from(folder)
    settings_before, settings = compared(record.tried.config), compared(now.config)
    if settings_before != settings:
        name = first_changed(settings_before, settings)
        return f"{name} was {settings_before.get(name)}, and is {settings.get(name)}"
    if record.tried.inputs != now.inputs:
        return f"{first_changed(record.tried.inputs, now.inputs)} has changed"
    if record.result != digest(step.result):
        return f"{step.result} has changed"
    return ""


def compared(config: Any) -> dict[str, Any]:
    """Return what is compared of a config."""
    settings = config if isinstance(config, dict) else {"a setting": config}
    return compared_settings(settings)


def first_changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the first key whose value differs."""
    return next(key for key in {**before, **now} if before.get(key, ...) != now.get(key, ...))


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
    failures: list[str] = []
    for i, step in enumerate(missing):
        followed = read_record(step.follows, folder)
        if reason := why_not_run(step, followed):
            _leave_out(step, folder=folder, reason=reason, overwrite=overwrite)
            continue
        if followed and followed.outcome is Outcome.FAILED:  # the next call tries both
            continue
        watcher = StepWatcher(
            name=step.name,
            kind=step.kind,
            later=[other.kind for other in missing[i + 1 :]],
            seconds=_mean_seconds(folder),
        )
        announced = f"[{i + 1}/{len(missing)}] {step.name}", watcher.describe_left()
        print(", ".join(filter(None, announced)), flush=True)
        try:
            failure = _try_step(
                step, folder=folder, run=run, watcher=watcher, log=log, overwrite=overwrite
            )
        except NothingToMeasure as error:
            print(f"left out: {error}", flush=True)
            _leave_out(step, folder=folder, reason=str(error), overwrite=overwrite)
            continue
        if failure:
            failures.append(failure)
    return failures


def why_not_run(step: Step, followed: StepRecord | None) -> str:
    """Return why a step is left out before it is run, "" if it is run; `followed` is the step that it follows."""
    if step.why_left_out:
        return step.why_left_out
    if followed and followed.outcome in (Outcome.LEFT_OUT, Outcome.OUTSTANDING):
        return f"so was {step.follows}, with which it is compared"
    return ""


def _try_step(
    step: Step,
    folder: Path,
    run: Callable[[Step], None],
    watcher: StepWatcher,
    log: Path | None,
    overwrite: bool,
) -> str:
    """Run a step and record what became of it; return what it said if it is optional and failed, else "".

    The inputs are recorded as they were before: what has changed since was not read.

    Raises:
        NothingToMeasure: It is to be left out.
    """
    started = time.perf_counter()
    tried = step.made_from(folder)
    earlier = read_record(step.name, folder)
    outcome, reason, kept = Outcome.DONE, "", None
    try:
        with output_of_command() as watcher.lines, watched(watcher):
            run(step)
    except KeyboardInterrupt:
        raise KeyboardInterrupt from None  # without the advice to resume a run of its own
    except NothingToMeasure:
        raise
    except Exception as error:
        if not step.optional:
            raise
        outcome, reason = Outcome.FAILED, _describe_failure(step, error, log)
        if overwrite:
            step.result.unlink(missing_ok=True)
        if earlier and step.result.is_file():
            kept = earlier.made_from
        print(f"failed: {step.name}: {reason}", flush=True)
    StepRecord(
        step=step.name,
        kind=step.kind,
        tried=tried,
        result=digest(step.result),
        seconds=time.perf_counter() - started,
        outcome=outcome,
        reason=reason,
        kept=kept,
    ).write(folder)
    return f"{step.name}: {reason}" if outcome is Outcome.FAILED else ""


def _leave_out(step: Step, folder: Path, reason: str, overwrite: bool) -> None:
    """Record that a step was left out; a result from other inputs than are there now would be none of this work."""
    if overwrite or _is_outdated(step, folder):
        step.result.unlink(missing_ok=True)
    StepRecord(
        step=step.name,
        kind=step.kind,
        tried=step.made_from(folder),
        result=digest(step.result),
        seconds=0.0,
        outcome=outcome_of_left_out(reason),
        reason=reason,
        is_planned=bool(step.why_left_out),
    ).write(folder)


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
    """Return the mean seconds of the steps that are done, by kind."""
    seconds: dict[str, list[float]] = {}
    for record in read_records(folder):
        if record.outcome is Outcome.DONE:
            seconds.setdefault(record.kind, []).append(record.seconds)
    return {kind: sum(values) / len(values) for kind, values in seconds.items()}


# ---------------------------------------------------------------------------------------------------- earlier results
def command_now(step: Step, folder: Path) -> list[str]:
    """Return the words of a step that is a command; a result that it has made from other inputs is replaced."""
    words = list(step.config)
    if not must_replace(step, folder):
        return words
    if "--ckpt_path" in words:  # to resume, which is the opposite
        start = words.index("--ckpt_path")
        words = words[:start] + words[start + 2 :]
    return [*words, "--overwrite", "true"]


def must_replace(step: Step, folder: Path, *, overwrite: bool = False) -> bool:
    """Return whether a step is told to overwrite the result that is there: it has made it from other inputs.

    Args:
        step: The step.
        folder: Folder of the records.
        overwrite: Replace any other result, too.
    """
    is_there = step.takes_overwrite and step.result.is_file()
    return is_there and (overwrite or _is_outdated(step, folder))


def _is_outdated(step: Step, folder: Path) -> bool:
    """Return whether the result that is there was made by this call from other inputs."""
    record = read_record(step.name, folder)
    if record is None or record.made_from is None:
        return False
    now = step.made_from(folder)
    is_this_call = compared(record.made_from.config) == compared(now.config)
    return is_this_call and record.made_from.inputs != now.inputs
