"""`probes rehearse`: write the inputs, run the study's commands one after the other, print what they took."""

import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from llava_bidir.common.atomic_io import read_json, write_files
from llava_bidir.common.errors import UserError
from llava_bidir.common.process_group import end_on_signals
from llava_bidir.common.run_lock import exclusive_run_lock
from llava_bidir.common.steps import find_missing, read_record, run_steps
from probes.world_options import RehearseOptions

from .cost import extrapolate
from .inputs import KEPT, write_inputs
from .measure import NAMES, read_speed, run_measured
from .published import SIZES
from .study import MASKS, RehearsalStep, plan_study

MEASURED = ("wall_s", "host_gb", "host_with_files_gb", "device_gb", "samples", *NAMES)
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def run(options: RehearseOptions) -> None:
    """Rehearse the study in `options.out`; finished steps of an earlier call are kept with their measurements.

    Raises:
        UserError: `options.out` holds a rehearsal of another size, encoder or number of images, or there are too few.
        SystemExit: A step failed (status 1).
    """
    images = options.images or SIZES[options.size].training_images
    if images <= KEPT:
        raise UserError(f"--images is {images}; the solver keeps {KEPT}: expected more")
    options.out.mkdir(parents=True, exist_ok=True)
    with exclusive_run_lock(options.out):
        end_on_signals()
        record = start_record(options.out / "rehearsal.json", options.size, options.encoder, images)
        # before the inputs, which are of this size
        write_files({options.out / "rehearsal.json": record})
        if not (options.out / "inputs/env.sh").is_file():
            print(
                f"writing random models of size {options.size} to {options.out / 'inputs'}",
                flush=True,
            )
            write_inputs(options.out / "inputs", options.size, options.encoder, images)
        if options.inputs_only:
            return
        os.environ |= OFFLINE
        # the same however it is spelled: steps are compared by their words
        out = options.out.resolve()
        logs = out / "logs"
        steps = plan_study(out, options.size, options.encoder)

        def save() -> None:
            measured = {step.name: read_measurements(step, logs) for step in steps}
            record["steps"] = {name: found for name, found in measured.items() if found}
            record["cost"] = extrapolate(record["steps"], len(record["devices"]))
            write_files({options.out / "rehearsal.json": record})

        failed = run_steps(
            find_missing(steps, logs),
            logs,
            run_step,
            after=save,
        )
    print(format_table(record))
    for line in describe_certificates(options.out):
        print(line)
    if failed:
        raise UserError(f"{len(failed)} steps failed: {'; '.join(failed)}")


def start_record(file: Path, size: str, encoder: str, images: int) -> dict[str, Any]:
    """Return the contents of `rehearsal.json`, or those of a new rehearsal."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    settings = {
        "size": size,
        "encoder": encoder,
        "images": images,
        "devices": gpus or [platform.machine()],
    }
    if not file.is_file():
        return {
            **settings,
            "steps": {},
            "cost": [],
        }
    record = {"images": SIZES[size].training_images} | read_json(file)
    for key, value in settings.items():
        if record.get(key) != value:
            raise UserError(
                f"{file} is of {key} {record.get(key)!r}, not {value!r}; use another --out"
            )
    return record


def run_step(step: RehearsalStep) -> dict[str, Any]:
    """Run a step and return what was measured, also if it has failed."""
    log = step.result
    package, *words = step.config
    measured = run_measured([sys.executable, "-m", package, *words], log)
    if measured.pop("returncode"):
        lines = log.read_text(errors="replace").strip().splitlines()
        measured["failed"] = f"{lines[-1]} (its log is {log})"
    elif step.events is not None:
        measured |= {"samples": step.samples, **read_speed(step.events)}
    return measured


def read_measurements(step: RehearsalStep, logs: Path) -> dict[str, Any]:
    """Return status, log and measurements of a step from its record, {} if it has not run."""
    record = read_record(step.name, logs)
    if not record:
        return {}
    status = "failed" if record.get("failed") else "finished"
    measured = {key: value for key, value in record.items() if key in MEASURED}
    return {"status": status, "log": str(step.result)} | measured


def describe_certificates(out: Path) -> list[str]:
    """Return a line on the solved probes of each mask whose study has finished, with their largest certificates."""
    lines = []
    for mask in MASKS:
        file = out / mask / "trained/metrics.json"
        if not file.is_file():
            continue
        path = read_json(file)["path"]
        found = [
            certificate for site in path["optimum"]["sites"] for certificate in site["certificates"]
        ]
        known = [certificate for certificate in found if certificate]
        converged = sum(certificate["converged"] for certificate in known)
        largest = {
            key: max((x[key] for x in known), default=float("nan"))
            for key in ("gradient", "decrease")
        }
        lines.append(
            f"{mask}: probes of {path['sample_images']} images' memory after {path['passes']} passes: {converged} of "
            f"{len(known)} certificates hold; gradients are at most {largest['gradient']:.1e}, decreases "
            f"{largest['decrease']:.1e} nats"
        )
    return lines


COLUMNS = {  # key: heading, format
    "wall_s": ("s", "{:.0f}"),
    "host_gb": ("host GB", "{:.1f}"),
    "device_gb": ("device GB", "{:.1f}"),
    "step_s": ("s/step", "{:.2f}"),
    "tokens_per_s": ("tokens/s", "{:.0f}"),
}


def format_table(record: dict[str, Any]) -> str:
    """Return the table of all steps, and the cost of the real study."""
    lines = [f"{'step':32}{'':10}" + "".join(f"{heading:>11}" for heading, _ in COLUMNS.values())]
    for name, step in record["steps"].items():
        cells = [
            form.format(step[key]) if key in step else "-" for key, (_, form) in COLUMNS.items()
        ]
        lines.append(f"{name:32}{step['status']:10}" + "".join(f"{cell:>11}" for cell in cells))
    if record["cost"]:
        lines.append(
            f"\nThe real run of a model of this size, at the speed measured on {', '.join(record['devices'])}:"
        )
    for part in record["cost"]:
        lines.append(f"{part['part']:32}{part['device_hours']:>12,.1f} device-hours")
        lines.append(f"    assumes {part['assumes']}")
    return "\n".join(lines)
