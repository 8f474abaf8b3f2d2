"""Train LLaVA's own code and ours on the same batches, and compare every step.

    make test-llava    # in .venv-llava, with the authors' package from PyPI; results in runs/peers/llava

Status 1 if a difference is larger than its case allows. `--write` renews curves.csv and losses.png beside this file.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
RUNS = Path("runs/peers/llava").resolve()
THEIR_PYTHON = os.environ.get("LLAVA_PYTHON", ".venv-llava/bin/python")
ENVIRONMENT = os.environ | {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")]),
    "TRANSFORMERS_VERBOSITY": "error",
}


def call(python: str, script: str, *arguments, log: Path) -> None:
    """Run a script of this folder; stop with the end of its log if it fails."""
    command = [python, str(HERE / script), *map(str, arguments)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        status = subprocess.run(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT,
        ).returncode
    if status:
        sys.exit(f"{script} failed; the end of {log}:\n{log.read_text()[-2000:]}")


def train(case, world: Path, adapter: Path, out: Path) -> None:
    """Train a case with both programs, unless it is there."""
    theirs = out / "theirs"
    if not (theirs / "weights.npz").exists():
        flags = case.their_flags(world, adapter, theirs)
        call(
            THEIR_PYTHON,
            "theirs.py",
            theirs,
            case.precision,
            *flags,
            log=out / "theirs.log",
        )
    if not (out / "ours" / "weights.npz").exists():
        flags = case.our_flags(world, adapter)
        call(
            sys.executable,
            "ours.py",
            out / "ours",
            theirs,
            *flags,
            log=out / "ours.log",
        )


def main() -> int:
    """Train and compare the cases; return 1 if one differs more than it may."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="cases whose names contain this")
    arguments = parser.parse_args()
    world = RUNS / "world"
    if not (world / "adapter" / "hf").exists():
        call(sys.executable, "world.py", world, log=RUNS / "world.log")
    from cases import CASES
    from compare import Training, compare, initial_weights

    failed = 0
    for case in CASES:
        if arguments.only not in case.name:
            continue
        out = RUNS / case.name.replace(", ", "_").replace(" ", "_")
        adapter = world / "adapter"
        train(case, world, adapter, out)
        theirs = Training.read(out / "theirs")
        ours = Training.read(out / "ours")
        before = initial_weights(adapter)
        result = compare(theirs, ours, before)
        print(case.name, result, flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
