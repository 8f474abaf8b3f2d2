"""Run the steps of a study in this process, one after the other, and only those that are missing or changed.

DIR/[LABEL/]ARM/          an arm: a finished run, with the results of its analyses
DIR/report/               the report
DIR/table.csv, .parquet   all results as one table
DIR/steps/                command, seconds and memory of each step, and the hashes of what it read and wrote
DIR/study.log             what the steps print
"""

import gc
import hashlib
import os
import re
import resource
import shlex
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava_bidir.common.arguments import check_is_list
from llava_bidir.common.atomic_io import read_json, write_files
from llava_bidir.common.errors import NothingToMeasure, UserError
from llava_bidir.common.identity import describe
from llava_bidir.common.process_group import end_on_signals, process_group
from llava_bidir.common.run_lock import exclusive_run_lock
from probes.analyses import ANALYSES
from probes.cli import build_parser, run_command
from probes.report.summary_text import format_results
from probes.results.runs import finished_runs, open_run
from probes.results.steps import OUTCOMES, unfinished_steps

from .options import read_setting
from .plan import Settings, Step, check, make_plan
from .table import Study, write_table

# Settings that are lists, with an example for errors
LISTS = {
    "arms": "['trained', 'random0']",
    "tasks": "['depth']",
    "add": "['knockout.classes=sky']",
    "only": "['solve', 'report']",
    "options": "['--data.batch_size', '2']",
}
RUNS = ("solve", "fit")  # kinds of steps whose result is a finished run


def study(
    model: str | Path | dict[str, str | Path],
    data: str | Path,
    *,
    out: str | Path,
    overwrite: bool = False,
    **settings: Any,
) -> Study:
    """Solve the probes of a model and of its random controls, analyse them, and write a report; `probes study`.

    What is finished is not done again: call it once more after a kill, or with more `draws`. ::

        study = probes.study("llava-hf/llava-1.5-7b-hf", "photos", out="runs/photos")
        study.claims()          # a pandas DataFrame
        study.table().query("metric == 'miou' and weights == 'trained'")

    Args:
        model: Checkpoint directory or hub id, or two of them by label, e.g. {"causal": ..., "bidirectional": ...}.
        data: Folder of images and masks (probes/README.md), or the name of a layout.
        out: Folder of the study.
        overwrite: Replace results that other settings, models or data have made.
        settings: Other fields of :class:`probes.studies.plan.Settings`: draws, arms, fit, tasks, add, only, options.

    Raises:
        UserError: A setting, the model or the data are invalid, or `out` holds a study of others.
    """
    for key, example in LISTS.items():
        if settings.get(key) is not None:
            check_is_list(key, settings[key], example)
    if not isinstance(model, str | Path | dict):
        raise UserError(
            f"model must be a directory, a hub id, or two by label as a dict, got {model!r}"
        )
    if isinstance(model, dict):
        models = {label: str(path) for label, path in model.items()}
    else:
        models = {"": str(model)}
    tuples = {
        key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()
    }
    run_study(Settings(models, str(data), Path(out), **tuples), overwrite)
    return Study(Path(out))


def run_study(settings: Settings, overwrite: bool = False) -> None:
    """Run what is missing of a study, and print its verdicts.

    Raises:
        UserError: The study cannot be run, or a step has failed. If that is an analysis, all others and the report are
            made before.
    """
    check(settings)
    steps = make_plan(settings)
    out = settings.out
    check_words(steps)
    names = [*filter(None, settings.models), *(settings.arms or ())]
    part = "+".join(names).replace("/", ".")
    with exclusive_run_lock(out, part or "study"):  # jobs of other models or arms can run meanwhile
        missing = _missing(steps, out, _changed_models(steps, overwrite))
        failed = _run_steps(missing, settings, overwrite)
        if any(step.kind == "report" for step in missing):
            write_table(out)  # like the report, by one job only
    if not missing:
        print(f"{out} is complete; nothing to do")
    report = out / "report"
    if (report / "results.json").is_file():
        print(f"\n{format_results(read_json(report / 'results.json'))}\n{report / 'index.html'}")
    if failed:
        steps_have = "a step has" if len(failed) == 1 else f"{len(failed)} steps have"
        raise UserError(
            f"{steps_have} failed, and the report is without it: {'; '.join(failed)}. The same command tries again"
        )


def check_words(steps: list[Step]) -> None:
    """End the command with a usage error if the command of an analysis is not one: `--add` can name any option."""
    parser = build_parser()
    for step in steps:
        if step.kind in ANALYSES:
            parser.parse_args(step.command)


def _run_steps(missing: list[Step], settings: Settings, overwrite: bool) -> list[str]:
    """Run steps, record what became of each, and return what those that failed have said."""
    failed: list[str] = []
    out = settings.out
    for i, step in enumerate(missing):
        if step.kind == "report" and not any(run.name == "trained" for run in finished_runs(out)):
            print("no report: the trained model is not solved yet")
            continue
        if step.lacks:
            print(f"{step.name} is left out: {step.lacks}", flush=True)
            _leave_out(step, out, step.lacks, overwrite)
            continue
        if outcome := _outcome_of_trained_arm(step, out):
            if outcome == "left_out":  # of one that failed, the next call tries both
                _leave_out(
                    step,
                    out,
                    "so was that of the trained model, with which it is compared",
                    overwrite,
                )
            continue
        left = _time_left(missing[i:], out)
        print(f"[{i + 1}/{len(missing)}] {step.name}{left and f', {left}'}", flush=True)
        started = time.perf_counter()
        failure: dict[str, str] = {}
        try:
            _run_step(step, _command(step, out, overwrite), settings)
        except NothingToMeasure as error:
            print(f"left out: {error}", flush=True)
            _leave_out(step, out, str(error), overwrite)
            continue
        except Exception as error:
            if step.kind not in ANALYSES:
                raise
            failed.append(_describe_failure(step, error, settings))
            print(f"failed: {failed[-1]}", flush=True)
            failure = {"failed": failed[-1].removeprefix(f"{step.name}: ")}
        _write_record(step, out, time.perf_counter() - started, failure)
    return failed


def _outcome_of_trained_arm(step: Step, out: Path) -> str | None:
    """Return "left_out" or "failed" if the analysis of the trained model was, with which a control is compared."""
    trained = f"{step.needs[-1]}/{step.kind}" if step.needs else step.name
    record = _read_record(trained, out) if trained != step.name else {}
    return next((key for key in OUTCOMES if record.get(key)), None)


def _leave_out(
    step: Step,
    out: Path,
    reason: str,
    overwrite: bool,
) -> None:
    """Record that a step was left out; a result of other probes than are there now would be none of the study."""
    if overwrite:
        step.result.unlink(missing_ok=True)
    _write_record(step, out, 0.0, {"left_out": reason})


def _describe_failure(step: Step, error: Exception, settings: Settings) -> str:
    """Return what a step that failed has said; the traceback of a bug goes to the log of the study."""
    if isinstance(error, UserError):
        return str(error)
    log_file = settings.out / "study.log"
    with log_file.open("a") as stream:
        traceback.print_exception(error, file=stream)
    return f"{step.name}: {type(error).__name__}: {error} (traceback in {log_file})"


# ---------------------------------------------------------------------------------------------------- what is done
def _record_file(step: str, out: Path) -> Path:
    return out / "steps" / f"{step.replace('/', '.')}.json"


def _read_record(step: str, out: Path) -> dict[str, Any]:
    file = _record_file(step, out)
    return read_json(file) if file.is_file() else {}


def _digest(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _inputs(step: Step, out: Path) -> dict[str, str | None]:
    """Return the hashes of what a step reads: of its arms, or for the report of all results."""
    if step.kind != "report":
        return {name: _digest(out / name / "metrics.json") for name in step.needs}
    names = ["metrics.json", *(analysis.result for analysis in ANALYSES.values())]
    files = [run / name for run in finished_runs(out) for name in names]
    unfinished = unfinished_steps(out)
    named = {"unfinished steps": describe(unfinished)} if unfinished else {}
    return {str(file.relative_to(out)): _digest(file) for file in files if file.is_file()} | named


def _is_done(step: Step, out: Path) -> bool:
    """Return whether this command, from what is there now, has made the result or had none to make."""
    record = _read_record(step.name, out)
    if step.lacks:
        return record.get("left_out") == step.lacks
    if record.get("failed") or record.get("lacks"):
        return False
    now = {
        "command": list(step.command),
        "inputs": _inputs(step, out),
        "result": _digest(step.result),
    }
    is_there = step.result.is_file() or bool(record.get("left_out"))
    return is_there and all(record.get(key) == value for key, value in now.items())


def _missing(steps: list[Step], out: Path, changed: set[str]) -> list[Step]:
    """Return the steps that are not done, are of changed models, or read what other missing steps write."""
    missing: list[Step] = []
    for step in steps:
        names = {other.name for other in missing}
        again = (names and step.kind == "report") or names & set(step.needs)
        if again or (step.kind in RUNS and _model(step) in changed) or not _is_done(step, out):
            missing.append(step)
    return missing


def _write_record(
    step: Step,
    out: Path,
    seconds: float,
    outcome: dict[str, str],
) -> None:
    """Write what a step has read and made, or under "left_out" or "failed" why it has made nothing."""
    now = {
        "command": list(step.command),
        "inputs": _inputs(step, out),
        "result": _digest(step.result),
    }
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # of this process so far
    record = {
        "step": step.name,
        "kind": step.kind,
        **now,
        "seconds": round(seconds, 1),
        "peak_gb": round(peak_gb, 2),
    }
    known_before = {"lacks": step.lacks} if step.lacks else {}
    write_files({_record_file(step.name, out): record | known_before | outcome})


def _changed_models(steps: list[Step], overwrite: bool) -> set[str]:
    """Return the models whose finished arms were made from other weights or images than are there now.

    Raises:
        UserError: There are some, and they may not be overwritten.
    """
    first: dict[str, Step] = {}
    for step in steps:
        if step.kind in RUNS and step.result.is_file():
            first.setdefault(_model(step), step)
    changed = set()
    for model, step in first.items():
        try:
            open_run(step.result.parent).check_unchanged()
        except UserError as error:
            if not overwrite:
                raise UserError(f"{error}; or choose another --out, or --overwrite true") from None
            changed.add(model)
    return changed


def _model(step: Step) -> str:
    return step.command[step.command.index("--model.mllm") + 1]


def _time_left(steps: list[Step], out: Path) -> str:
    """Return the time that the steps will take, as far as steps of their kind were timed; "" if none was."""
    seconds: dict[str, list[float]] = {}
    for file in (out / "steps").glob("*.json"):
        record = read_json(file)
        if any(record.get(key) for key in OUTCOMES):
            continue
        seconds.setdefault(record["kind"], []).append(record["seconds"])
    known = [
        sum(seconds[step.kind]) / len(seconds[step.kind]) for step in steps if step.kind in seconds
    ]
    return f"about {max(1, round(sum(known) / 60))} min left" if known else ""


# ---------------------------------------------------------------------------------------------------- one step
def _command(step: Step, out: Path, overwrite: bool) -> list[str]:
    """Return the words of the command. What it made from other inputs is replaced, anything else only if asked to."""
    words = list(step.command)
    record = _read_record(step.name, out)
    if step.kind == "report" or (step.kind in ANALYSES and ANALYSES[step.kind].of == "page"):
        return words  # pages replace their own earlier output
    outdated = record.get("command") == words and record["inputs"] != _inputs(step, out)
    if step.kind == "knockout":
        words = _same_classes(step, words, out)
    if not step.result.is_file() or not (overwrite or outdated):
        return words
    if step.kind in RUNS:
        words = words[: words.index("--ckpt_path")] + words[words.index("--ckpt_path") + 2 :]
    return [*words, "--overwrite", "true"]


def _same_classes(step: Step, words: list[str], out: Path) -> list[str]:
    """Return a knockout's command with the classes that were blocked in the trained arm: controls block the same.

    Probes that were trained for a few steps only may predict none of them, so they have classes of their own.
    """
    trained = out / step.needs[-1] / step.result.name
    if (
        step.result.parent in (trained.parent, trained.parent.with_name("probes"))
        or not trained.is_file()
    ):
        known = len(read_json(step.result.parent / "metrics.json")["classes"])
        return [
            f"auto:{min(int(word[5:]), known)}" if re.fullmatch(r"auto:\d+", word) else word
            for word in words
        ]
    start = words.index("--classes") + 1
    later_options = (i for i in range(start, len(words)) if words[i].startswith("--"))
    stop = next(later_options, len(words))
    classes = [entry["class"] for entry in read_json(trained)["classes"]]
    return words[:start] + classes + words[stop:]


def _run_step(step: Step, command: list[str], settings: Settings) -> None:
    """Run a command in this process, or with several devices in processes of its own.

    Raises:
        UserError: The command has failed on its input.
        NothingToMeasure: It has no case.
    """
    log_file = settings.out / "study.log"
    with _output_to(log_file):
        print(f"$ probes {shlex.join(command)}", flush=True)
        if step.kind in RUNS and uses_several_devices(settings):
            end_on_signals()
            with process_group([sys.executable, "-m", "probes", *command]) as process:
                failed = process.wait() != 0
        else:
            failed = False
            try:
                run_command(command)
            except NothingToMeasure:
                raise
            except UserError as error:
                raise UserError(f"{step.name}: {error}") from None
    if failed:
        raise UserError(f"{step.name} has failed; all it said is in {log_file}")
    gc.collect()  # the model of the step
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        sys.modules["torch"].cuda.empty_cache()


def uses_several_devices(settings: Settings) -> bool:
    """Return whether the trainer's options ask for more than one device; "auto" takes all GPUs."""
    given = str(read_setting(settings.options, "trainer.devices", "auto"))
    if given == "auto":
        import torch

        return torch.cuda.device_count() > 1
    return given not in ("1", "[0]")


@contextmanager
def _output_to(file: Path) -> Iterator[None]:
    """Append what is printed to a file; on a terminal, bars and messages stay visible."""
    kept = [fd for fd in (1, 2) if fd == 1 or not os.isatty(2)]

    def flush():
        return [stream.flush() for stream in (sys.stdout, sys.stderr)]

    flush()
    streams = sys.stdout, sys.stderr  # in a notebook not those of the process
    if sys.stdout is not sys.__stdout__ and sys.__stdout__ and sys.__stderr__:
        sys.stdout = sys.__stdout__
        sys.stderr = sys.__stderr__
    saved = {fd: os.dup(fd) for fd in kept}
    with file.open("ab") as stream:
        for fd in kept:
            os.dup2(stream.fileno(), fd)
    try:
        yield
    finally:
        flush()
        sys.stdout, sys.stderr = streams
        for fd, copy in saved.items():
            os.dup2(copy, fd)
            os.close(copy)
