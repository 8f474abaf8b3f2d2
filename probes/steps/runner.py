"""Find the steps that are missing, run them in order, and record what became of each."""

import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from llava_bidir.common.errors import NothingToMeasure, UserError, describe_in_user_file

from .progress import StepWatcher, output_of_command, watched
from .record import (
    Outcome,
    Step,
    StepRecord,
    check_freshness,
    digest,
    leave_out,
    mean_seconds,
    must_replace,
    read_record,
    why_not_run,
)


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
    number = 0
    planned = sum(not step.why_left_out for step in missing)
    for i, step in enumerate(missing):
        number += not step.why_left_out
        followed = read_record(step.follows, folder)
        if reason := why_not_run(step, followed):
            leave_out(step, folder=folder, reason=reason, overwrite=overwrite)
            continue
        if followed and followed.outcome is Outcome.FAILED:  # the next call tries both
            continue
        watcher = StepWatcher(
            name=step.name,
            kind=step.kind,
            later=[other.kind for other in missing[i + 1 :] if not other.why_left_out],
            seconds=mean_seconds(folder),
        )
        announced = f"[{number}/{planned}] {step.name}", watcher.describe_left()
        print(", ".join(filter(None, announced)), flush=True)
        try:
            failure = _try_step(
                step, folder=folder, run=run, watcher=watcher, log=log, overwrite=overwrite
            )
        except NothingToMeasure as error:
            print(f"left out: {error}", flush=True)
            leave_out(step, folder=folder, reason=str(error), overwrite=overwrite)
            continue
        if failure:
            failures.append(failure)
    return failures


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


def _describe_failure(step: Step, error: Exception, log: Path | None) -> str:
    """Return what a step that failed has said; the traceback of a bug goes to the log."""
    if isinstance(error, UserError):
        return str(error).removeprefix(f"{step.name}: ")
    text = describe_in_user_file(error) or f"{type(error).__name__}: {error}"
    if log is None:
        return text
    with log.open("a") as stream:
        traceback.print_exception(error, file=stream)
    return f"{text} (traceback in {log})"


def command_now(step: Step, folder: Path) -> list[str]:
    """Return the words of a step that is a command; a result that it has made from other inputs is replaced."""
    words = list(step.config)
    if not must_replace(step, folder):
        return words
    if "--ckpt_path" in words:  # to resume, which is the opposite
        start = words.index("--ckpt_path")
        words = words[:start] + words[start + 2 :]
    return [*words, "--overwrite", "true"]
