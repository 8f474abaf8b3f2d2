"""Run the steps of a study in this process, one after the other, and only those that are missing or changed.

DIR/[LABEL/]ARM/          an arm: a finished run, with the results of its analyses
DIR/report/               the report
DIR/table.csv, .parquet   all results as one table
DIR/steps/                options and seconds of each step, and the hashes of what it read and wrote
DIR/study.log             what the steps print
"""

import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
import yaml

from llava_bidir.common.errors import NothingToMeasure, UsageError, UserError
from llava_bidir.common.files import exclusive_run_lock, read_json, write_files
from llava_bidir.common.imports import import_words
from probes.compute.process_group import end_on_signals, process_group
from probes.config import RunConfig, StudyOptions
from probes.heads import LINEAR
from probes.report.terminal import print_summary
from probes.runs.read import finished_runs
from probes.steps.record import Step, as_json, must_replace, record_file
from probes.steps.runner import find_missing, run_steps

from .arms import TRAINED
from .estimate import print_estimate
from .options import label_models, study_options, with_inputs
from .plan import RUNS, Planned, check_folder, plan, trained_first
from .table import Study, write_table

REPORT_WAIT_S = 600
LOG = "study.log"


def run(options: StudyOptions) -> None:
    """Run `probes study`."""
    *words, data = options.inputs
    if not words:
        raise UsageError("expected a model and a folder: probes study MODEL DATA --out DIR")
    study = with_inputs(options, label_models(words, options.model.trust), data)
    if study.dry_run:
        print_estimate(study)
    else:
        run_study(study)


def study(
    model: str | Path | dict[str, str | Path], data: str | Path, *, out: str | Path, **settings: Any
) -> Study:
    """Solve the probes of a model and of its random controls, analyse them, and write a report; `probes study`.

    What is finished is not done again: call it once more after a kill, or with more `draws`. ::

        study = probes.study("llava-hf/llava-1.5-7b-hf", "photos", out="runs/photos")
        study.claims()          # a pandas DataFrame
        study.table().query("metric == 'miou' and weights == 'trained'")

    Args:
        model: Checkpoint directory or hub id, or FILE.py:FUNCTION, or several by label, e.g. {"before": ..., "after":
            ...}; each is compared with the first.
        data: Folder of images and masks (probes/README.md), or the name of a layout.
        out: Folder of the study.
        settings: Those of :func:`probes.studies.options.study_options`: draws, arms, fit, tasks, add, only, overwrite;
            options of the probe runs nested as in YAML, options={"data": {"batch_size": 2}}, and names of YAML files,
            configs.

    Raises:
        UserError: A setting, the model or the data are invalid, or `out` holds a study of others.
    """
    models = model if isinstance(model, dict) else {"": model}
    paths = {label: str(path) for label, path in models.items()}
    run_study(study_options(paths, str(data), out=out, **settings))
    return Study(Path(out))


def run_study(study: StudyOptions) -> None:
    """Run what is missing of a study, and print its verdicts.

    Raises:
        UserError: The study cannot be run, or a step has failed. If that is an analysis, all others and the report are
            made before.
    """
    out = study.out
    planned = plan(study)
    _say_what_is_left_out(study, planned)
    part = "+".join([*study.labels, *study.arms]).replace("/", ".")
    with exclusive_run_lock(out, part or "study"):  # jobs of other models or arms can run meanwhile
        check_folder(study, planned)
        missing = find_missing(planned.steps, out)
        solved = [run.name for run in finished_runs(out)]
        solved += [Path(step.name).name for step in missing if step.kind == "solve"]
        ready = missing
        if TRAINED not in solved:
            ready = [step for step in missing if step.kind != "report"]
        if len(ready) < len(missing):
            print("no report: the trained model is not solved yet")
        failures = run_steps(
            trained_first(ready),
            out,
            run=partial(_run_step, study),
            log=out / LOG,
            overwrite=study.overwrite,
        )
        lacks_table = finished_runs(out) and not (out / "table.csv").is_file()
        if len(ready) < len(missing) or lacks_table:  # a report that was made has written it
            write_table(out, study.labels)
    if not missing:
        print(f"{out} is complete; nothing to do")
    _print_report(out / "report")
    if failures:
        raise UserError(
            f"{len(failures)} of the steps failed, and the report is without the result, or has an earlier one: "
            f"{'; '.join(failures)}. The same command tries again"
        )


def _say_what_is_left_out(study: StudyOptions, planned: Planned) -> None:
    """Print why runs are left out, and that only linear probes are solved."""
    reasons = [step.why_left_out for step in planned.steps if step.kind in RUNS]
    for reason in dict.fromkeys(filter(None, reasons)):
        print(f"left out: {reason}")
    if study.model.head != LINEAR:
        print(
            f"{study.model.head} probes are trained and compared with trained linear ones; only linear ones are solved"
        )


def _print_report(report: Path) -> None:
    """Print the summary of a report, if there is one."""
    if (report / "results.json").is_file():
        print()
        results = read_json(report / "results.json")
        print_summary(results["summary"], report / "index.html", lab=results.get("lab", ""))


# ---------------------------------------------------------------------------------------------------- one step
def _run_step(study: StudyOptions, step: Step) -> None:
    """Run a step in this process, or with several devices in processes of its own.

    What it made from other inputs is replaced, all else only if asked to.

    Raises:
        UserError: The step has failed on its input.
        NothingToMeasure: It has no case.
    """
    config = step.config
    if must_replace(step, study.out, overwrite=study.overwrite):
        config = replace(config, overwrite=True)
        if step.kind in RUNS:
            config = replace(config, ckpt_path=None)  # to resume is the opposite
    turn = nullcontext()
    if step.kind == "report":  # jobs of several arms may end together
        turn = exclusive_run_lock(study.out, "report-step", wait_s=REPORT_WAIT_S)
    with turn, _output_to(study.out / LOG):
        settings = json.dumps(as_json(config, study.out))
        print(f"{step.name}: probes {step.kind} with {settings}", flush=True)
        try:
            if step.kind in RUNS and uses_several_devices(study):
                _run_in_processes(step, config, study.out)
            else:
                resolve_name(step.call)(config)
        except NothingToMeasure:
            raise
        except UserError as error:
            raise UserError(f"{step.name}: {error}") from None
    gc.collect()  # the model of the step
    torch.cuda.empty_cache()  # does nothing without a GPU


def _run_in_processes(step: Step, config: RunConfig, out: Path) -> None:
    """Run a command with the config as a file; Lightning starts further processes of the same command.

    Raises:
        UserError: It has failed.
    """
    file = record_file(step.name, out).with_suffix(".yaml")
    values = asdict(config)
    if step.kind == "fit":
        del values["solver"]
    write_files({file: yaml.safe_dump(values, sort_keys=False)})
    end_on_signals()
    command = [sys.executable, "-m", "probes", step.kind, "-c", str(file), *import_words()]
    with process_group(command) as process:
        status = process.wait()
    if status:
        raise UserError(f"the step has failed; all it said is in {out / LOG}")


def uses_several_devices(study: StudyOptions) -> bool:
    """Return whether the trainer's options ask for more than one device; "auto" takes all GPUs."""
    devices = str(study.trainer.get("devices", "auto"))
    if devices == "auto":
        return torch.cuda.device_count() > 1
    return devices not in ("1", "[0]")


@contextmanager
def _output_to(file: Path) -> Iterator[None]:
    """Append what is printed to a file; on a terminal, bars and messages stay visible."""
    redirected = [1]
    if not os.isatty(2):
        redirected.append(2)

    def flush() -> None:
        sys.stdout.flush()
        sys.stderr.flush()

    flush()
    streams = sys.stdout, sys.stderr  # in a notebook not those of the process
    if sys.stdout is not sys.__stdout__ and sys.__stdout__ and sys.__stderr__:
        sys.stdout = sys.__stdout__
        sys.stderr = sys.__stderr__
    saved = {fd: os.dup(fd) for fd in redirected}
    with file.open("ab") as stream:
        for fd in redirected:
            os.dup2(stream.fileno(), fd)
    try:
        yield
    finally:
        flush()
        sys.stdout, sys.stderr = streams
        for fd, copy in saved.items():
            os.dup2(copy, fd)
            os.close(copy)
