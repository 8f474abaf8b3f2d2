"""`llava-bidir vqa`: run the benchmarks of Table 1 for a checkpoint and validate their results."""

import json
import os
from pathlib import Path

from llava_bidir.command_options import VQAOptions
from llava_bidir.common.errors import UserError
from llava_bidir.common.process_group import end_on_signals, process_group
from llava_bidir.common.run_lock import exclusive_run_lock

from .checkpoint import fingerprint, read_encoder_name, read_image_attention, resolve_checkpoint
from .result_files import PACKAGE, error_file, read_results, results_file
from .table1 import write_tables

# they would change the results of the harness
IGNORED_VARIABLES = ("NUM_IMAGE", "LMMS_EVAL_PLUGINS")
# may be relative; the harness runs in another folder
FOLDERS = ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE")


def run(options: VQAOptions) -> None:
    """Run the tasks that are not finished, then validate all results and write the table.

    Raises:
        UserError: The harness failed or a result is invalid. The message names the task and the item.
    """
    if "toy" in options.tasks and options.data is None:
        raise UserError(
            "--tasks toy needs --data ASSETS, the folder that `probes demo-assets` has written"
        )
    model = resolve_checkpoint(options.model)
    info = {
        "model": str(options.model),
        "image_attention": read_image_attention(model),
        "encoder": read_encoder_name(model),
        "fingerprint": fingerprint(model),
        "batch_size": options.batch_size,
        "data": "hub" if options.data is None else str(options.data.resolve()),
    }
    with exclusive_run_lock(options.out):
        end_on_signals()
        pending = [name for name in options.tasks if not _is_finished(options.out, name, info)]
        if pending:
            _run_harness(options, model, pending, info)
    missing = [name for name in options.tasks if not results_file(options.out, name).exists()]
    if missing:
        raise UserError(
            f"{', '.join(missing)}: the harness succeeded but wrote no results; see its output above"
        )
    print(write_tables([options.out], options.out))  # validates all finished tasks


def _is_finished(out: Path, name: str, info: dict) -> bool:
    """Return True if the task has results. Raise a UserError if they belong to another checkpoint or other data."""
    if not results_file(out, name).exists():
        return False
    earlier, _ = read_results(out, name)
    for key, what in (("fingerprint", "another checkpoint"), ("data", "other data")):
        if earlier[key] != info[key]:
            raise UserError(
                f"{results_file(out, name)} belongs to {what} ({key} {earlier[key]} instead of {info[key]}); choose "
                "another --out"
            )
    return True


def _run_harness(
    options: VQAOptions,
    model: Path,
    names: list[str],
    info: dict,
) -> None:
    """Run the harness in its own environment, with its output on the terminal.

    Raises:
        UserError: The environment does not exist, or the harness failed.
    """
    python = (
        options.python.absolute()
    )  # not resolved: the python of an environment is a symbolic link
    if not python.is_file():
        raise UserError(
            f"{options.python} does not exist; create it with `make vqa-venv` or set --python"
        )
    if options.data is not None and not options.data.is_dir():
        raise UserError(f"--data {options.data} is not a folder")
    out = options.out.resolve()
    error = error_file(out)
    error.parent.mkdir(parents=True, exist_ok=True)
    error.unlink(missing_ok=True)
    request = {
        **{
            "model": str(model.resolve()),
            "benchmarks": names,
            "out": str(out),
            "batch_size": options.batch_size,
        },
        **{
            "info": info,
            "package": str(PACKAGE),
            "local": options.data is not None,
        },
    }
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(options.devices),
    ]
    command = [
        str(python),
        *(torchrun if options.devices > 1 else []),
        "-m",
        "llava_bidir.vqa.harness",
    ]
    environment = {
        name: value for name, value in os.environ.items() if name not in IGNORED_VARIABLES
    }
    environment |= {
        name: os.path.abspath(os.environ[name]) for name in FOLDERS if name in os.environ
    }
    folder = options.data or error.parent
    with process_group([*command, json.dumps(request)], cwd=folder, env=environment) as process:
        status = process.wait()
    if error.exists():
        raise UserError(error.read_text().strip())
    if status:
        raise UserError(
            f"{' '.join(names)}: the harness exited with {status}; see its output above"
        )
