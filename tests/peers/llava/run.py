"""Train LLaVA's own code and ours on the same batches, and compare every step.

    make test-llava    # both in half an hour; .venv-llava has the authors' package from PyPI

Results are in runs/peers/llava; status 1 if a difference is larger than its case allows, or a mutation is not seen.
What is there is not trained again. `--write` renews the files of results beside this one.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from cases import BY_NAME, CASES, Case
from compare import Training, compare, initial_weights
from mutations import MUTATIONS, STEPS, Mutation
from report import write_report

HERE = Path(__file__).parent
RUNS = Path("runs/peers/llava").resolve()
WORLD = RUNS / "world"
ADAPTER = WORLD / "adapter"
THEIR_PYTHON = ".venv-llava/bin/python"


def call(python: str, packages: Path, log: Path, script: str, *arguments) -> None:
    """Run a script of this folder, with packages of another one; stop with the end of its log if it fails."""
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(packages),
        "TRANSFORMERS_VERBOSITY": "error",
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        status = subprocess.run(
            [python, str(HERE / script), *map(str, arguments)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
        ).returncode
    if status:
        sys.exit(f"{script} failed; the end of {log}:\n{log.read_text()[-2000:]}")


def train_theirs(case: Case) -> Path:
    """Return the folder of LLaVA's training of a case."""
    case = BY_NAME[case.theirs_of or case.name]
    out = RUNS / case.folder / "theirs"
    if not (out / "weights.npz").exists():
        flags = case.their_flags(WORLD, ADAPTER, out)
        log = out.with_suffix(".log")
        call(THEIR_PYTHON, HERE, log, "theirs.py", out, case.precision, *flags)
    return out


def train_ours(case: Case, out: Path, packages: Path, *more: str) -> Path:
    """Return the folder of our training of a case."""
    if not (out / "weights.npz").exists():
        arguments = [out, train_theirs(case), *case.our_flags(WORLD, ADAPTER), *more]
        call(sys.executable, packages, out.with_suffix(".log"), "ours.py", *arguments)
    return out


def compare_case(case: Case, before: dict) -> dict:
    """Train a case with both programs and return the differences."""
    theirs = Training.read(train_theirs(case))
    trained = BY_NAME[case.ours_of or case.name]
    if case.ours_of:
        train_theirs(trained)  # whose order ours takes
    ours = Training.read(train_ours(trained, RUNS / trained.folder / "ours", Path.cwd()))
    rounded = None
    if case.rounding_of:
        rounded = Training.read(train_theirs(BY_NAME[case.rounding_of]))
    return compare(theirs, ours, before, rounded)


def compare_mutation(mutation: Mutation, before: dict) -> dict:
    """Train a case with a changed copy of our package and return the differences from LLaVA's."""
    case = BY_NAME[mutation.case]
    folder = RUNS / "mutations" / mutation.name.replace(" ", "_")
    if not (folder / "llava_bidir").exists():
        mutation.copy(folder)
    more = ("--stop-after", str(STEPS))
    ours = Training.read(train_ours(case, folder / "ours", folder, *more))
    return compare(Training.read(train_theirs(case)), ours, before)


def main() -> int:
    """Train and compare; return 1 if a case differs more than it may, or a mutation does not differ."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="cases and mutations whose names contain this")
    parser.add_argument("--write", action="store_true", help="renew the committed results")
    arguments = parser.parse_args()
    if not (ADAPTER / "hf").exists():
        call(sys.executable, Path.cwd(), RUNS / "world.log", "world.py", WORLD)
    before = initial_weights(ADAPTER)
    cases = {}
    wrong = []
    for case in CASES:
        if arguments.only in case.name:
            cases[case.name] = result = compare_case(case, before)
            print(f"{case.name}: {result}", flush=True)
            wrong += [f"{case.name}: {text}" for text in case.exceeded(result)]
    mutations = {}
    for mutation in MUTATIONS:
        if arguments.only in mutation.name:
            mutations[mutation.name] = result = compare_mutation(mutation, before)
            print(f"{mutation.name}: {result}", flush=True)
            if not BY_NAME[mutation.case].exceeded(result):
                wrong.append(f"{mutation.name}: not seen")
    if arguments.write:
        write_report(HERE, RUNS, cases, mutations)
    print("\n".join(wrong) or "all as expected")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
