"""A step, and its record: what it was made from, and what became of it.

FOLDER/steps/NAME.json records of each step its config, hashes of what it read and wrote, and its seconds, or why
it has made nothing.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, Self

from llava_bidir.common.files import read_json, sha256, write_files
from llava_bidir.common.identity import compared_settings

# The reason of a step that is put off. In files, it tells this step from those that are left out for good.
OUTSTANDING = "outstanding, since the first report comes before the controls"


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

    def made_from(self, folder: Path) -> "MadeFrom":
        """Return what a result of now would be made from; records are in `folder`."""
        return MadeFrom(config=as_json(self.config, folder), inputs=self.inputs())


class MadeFrom(NamedTuple):
    """What a result is made from.

    Args:
        config: All that the call was given, see :func:`as_json`.
        inputs: Hashes of what it has read, by name.
    """

    config: Any
    inputs: Mapping[str, str | None]


class Outcome(StrEnum):
    """What became of a step."""

    DONE = "done"
    LEFT_OUT = "left out"  # it had nothing to measure
    FAILED = "failed"
    OUTSTANDING = "outstanding"  # the same call runs it later


@dataclass(frozen=True)
class StepRecord:
    """What a step was made from, and what became of it.

    Args:
        step: Name of the step.
        kind: Kind of the step.
        tried: Config and inputs of the last try.
        result: Hash of the result after it; None if there is none.
        seconds: Its time.
        outcome: What became of it.
        reason: Why it has no result of its own; "" if it is done.
        is_planned: Whether it was left out before any work.
        kept: Of a step that failed: what the result that is there was made from; None if there is none.
    """

    step: str
    kind: str
    tried: MadeFrom
    result: str | None
    seconds: float
    outcome: Outcome = Outcome.DONE
    reason: str = ""
    is_planned: bool = False
    kept: MadeFrom | None = None

    @property
    def made_from(self) -> MadeFrom | None:
        """What the result that is there was made from: a step that failed has not replaced it."""
        return self.kept if self.outcome is Outcome.FAILED else self.tried

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Return the record of a file with this content."""
        tried, kept = MadeFrom(content["config"], content["inputs"]), None
        outcome, reason = Outcome.DONE, ""
        if content.get("failed"):
            outcome, reason = Outcome.FAILED, content["failed"]
            if made := content.get("kept", content):
                kept = MadeFrom(made["config"], made["inputs"])
        elif content.get("left_out"):
            reason = content["left_out"]
            outcome = outcome_of_left_out(reason)
        return cls(
            step=content["step"],
            kind=content["kind"],
            tried=tried,
            result=content["result"],
            seconds=content["seconds"],
            outcome=outcome,
            reason=reason,
            is_planned=bool(content.get("lacks")),
            kept=kept,
        )

    def write(self, folder: Path) -> None:
        """Write the file of the record; what is in it of a step that has no result says why."""
        content = {
            "step": self.step,
            "kind": self.kind,
            **self.tried._asdict(),
            "result": self.result,
            "seconds": round(self.seconds, 1),
        }
        if self.outcome is Outcome.FAILED:
            kept = self.kept._asdict() if self.kept else {}
            content |= {"failed": self.reason, "kept": kept}
        elif self.outcome is not Outcome.DONE:
            lacks = self.reason if self.is_planned else ""
            content |= {"left_out": self.reason, "lacks": lacks}
        write_files({record_file(self.step, folder): content})


def digest(file: Path) -> str | None:
    """Return the SHA-256 of a file, None if there is none."""
    return sha256(file) if file.is_file() else None


def as_json(value: Any, folder: Path) -> Any:
    """Return a value as a record has it after it was read back: dataclasses are objects, and paths are text.

    Paths in `folder` and beside it are relative to it, so that records are true wherever the work is moved or copied.
    """
    if is_dataclass(value):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): as_json(item, folder) for key, item in value.items()}
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


# --------------------------------------------------------------------------------------- is it done?
def read_record(name: str, folder: Path) -> StepRecord | None:
    """Return the record of a step, None if there is none."""
    file = record_file(name, folder)
    return StepRecord.from_json(read_json(file)) if file.is_file() else None


def record_file(name: str, folder: Path) -> Path:
    """Return the file of a step's record."""
    return folder / "steps" / f"{name.replace('/', '.')}.json"


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
    """Return what is compared of a config: of options that are None nothing, as earlier versions lack some."""
    settings = config if isinstance(config, dict) else {"a setting": config}
    return {name: value for name, value in compared_settings(settings).items() if value is not None}


def first_changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the first key whose value differs."""
    return next(key for key in {**before, **now} if before.get(key, ...) != now.get(key, ...))


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


# ---------------------------------------------------------------------------------- what is left out
def why_not_run(step: Step, followed: StepRecord | None) -> str:
    """Return why a step is left out before it is run, "" if it is run; `followed` is the step that it follows."""
    if step.why_left_out:
        return step.why_left_out
    if followed and followed.outcome in (Outcome.LEFT_OUT, Outcome.OUTSTANDING):
        return f"so was {step.follows}, with which it is compared"
    return ""


def leave_out(step: Step, folder: Path, reason: str, overwrite: bool) -> None:
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


def outcome_of_left_out(reason: str) -> Outcome:
    """Return the outcome of a step that was left out for this reason."""
    return Outcome.OUTSTANDING if reason == OUTSTANDING else Outcome.LEFT_OUT


# --------------------------------------------------------------------------- all records of a folder
def read_records(folder: Path) -> list[StepRecord]:
    """Return the records of all steps, in the order of their names."""
    files = sorted((folder / "steps").glob("*.json"))
    return [StepRecord.from_json(read_json(file)) for file in files]


def mean_seconds(folder: Path) -> dict[str, float]:
    """Return the mean seconds of the steps that are done, by kind."""
    seconds: dict[str, list[float]] = {}
    for record in read_records(folder):
        if record.outcome is Outcome.DONE:
            seconds.setdefault(record.kind, []).append(record.seconds)
    return {kind: sum(values) / len(values) for kind, values in seconds.items()}


def unfinished_steps(folder: str | Path) -> list[dict[str, str]]:
    """Return {"step", "outcome", "reason"} of each step that has no result, in the order of their names.

    The outcome is LEFT_OUT or FAILED: an outstanding step is left out of what is reported now.
    """
    unfinished = []
    for record in read_records(Path(folder)):
        outcome = record.outcome
        if outcome is Outcome.DONE:
            continue
        if outcome is Outcome.OUTSTANDING:
            outcome = Outcome.LEFT_OUT
        unfinished.append({"step": record.step, "outcome": outcome, "reason": record.reason})
    return unfinished


def describe_steps(unfinished: Iterable[dict[str, str]], outcome: Outcome) -> list[str]:
    """Return a line for each reason of the steps of :func:`unfinished_steps` with an outcome, LEFT_OUT or FAILED.

    What failed must be looked at, and is said first; what was left out had nothing to measure, and is said last.
    """
    names_by_reason: dict[str, list[str]] = {}
    for step in unfinished:
        if step["outcome"] == outcome:
            names_by_reason.setdefault(step["reason"], []).append(step["step"])
    return [f"{', '.join(names)} {outcome}: {reason}" for reason, names in names_by_reason.items()]
