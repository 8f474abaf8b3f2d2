"""`llava-bidir vqa`: the benchmarks of Table 1 for a checkpoint, task by task, and what they add up to."""

import argparse
import json
import os
import subprocess
from pathlib import Path

from llava_bidir.common.errors import UserError
from llava_bidir.common.run_lock import exclusive_run_lock

from . import checkpoint
from .benchmarks import BENCHMARKS
from .result_files import code_digest, error_file, read_results, results_file
from .table1 import write_tables
from .validate_results import problems

SWITCHES = ("NUM_IMAGE", "LMMS_EVAL_PLUGINS")  # environment variables that would change what the harness does


def run(args: argparse.Namespace) -> None:
    """`llava-bidir vqa`: runs what is missing, then checks everything that is there.

    Raises:
        UserError: Names the task and the item of whatever is wrong.
    """
    model = checkpoint.local(args.model)
    facts = {
        "model": str(args.model),
        "image_attention": checkpoint.image_attention(model),
        "encoder": checkpoint.encoder(model),
        "fingerprint": checkpoint.fingerprint(model),
        "batch_size": args.batch_size,
        "data": "hub" if args.data is None else str(args.data),
    }
    with exclusive_run_lock(args.out):
        missing = [name for name in args.tasks if not _finished(args.out, name, facts)]
        if missing:
            _start_harness(args, model, missing, facts)
    absent = [name for name in args.tasks if not results_file(args.out, name).exists()]
    if absent:
        raise UserError(f"{', '.join(absent)}: the harness ended well but left no results; all it said is above")
    there = [name for name in BENCHMARKS if results_file(args.out, name).exists()]  # all of which the table will have
    wrong = [line for name in there for line in problems(args.out, name, args.max_invalid_rate)]
    if wrong:
        raise UserError("\n".join(wrong))
    print(write_tables([args.out], args.out))


def _finished(out: Path, name: str, facts: dict) -> bool:
    """Raises ValueError if the results are of another checkpoint."""
    if not results_file(out, name).exists():
        return False
    found, _ = read_results(out, name)
    if found["fingerprint"] != facts["fingerprint"]:
        raise UserError(
            f"{results_file(out, name)} is of another checkpoint ({found['model']}, {found['fingerprint']}, not "
            f"{facts['fingerprint']}); choose another --out"
        )
    return True


def _start_harness(args: argparse.Namespace, model: Path, names: list[str], facts: dict) -> None:
    """Runs it in its own environment, with its output in the terminal.

    Raises:
        UserError: There is no such environment, or the harness failed.
    """
    python = args.python.absolute()  # not resolved: an environment's python is a link
    if not python.is_file():
        raise UserError(f"no {args.python}; `make vqa-venv` makes the harness's environment, --python names another")
    if args.data is not None and not args.data.is_dir():
        raise UserError(f"--data {args.data} is no folder")
    out = args.out.resolve()
    error = error_file(out)
    error.parent.mkdir(parents=True, exist_ok=True)
    error.unlink(missing_ok=True)
    request = {
        **{"model": str(model.resolve()), "benchmarks": names, "out": str(out), "batch_size": args.batch_size},
        **{"facts": facts, "code": code_digest(), "local": args.data is not None},
    }
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.devices)]
    command = [str(python), *(torchrun if args.devices > 1 else []), "-m", "llava_bidir.vqa.harness"]
    ended = subprocess.run(
        [*command, json.dumps(request)],
        cwd=args.data or error.parent,
        env={name: value for name, value in os.environ.items() if name not in SWITCHES},
    )
    if error.exists():
        raise UserError(error.read_text().strip())
    if ended.returncode:
        raise UserError(f"the harness ended with status {ended.returncode} in {' '.join(names)}; what it said is above")
