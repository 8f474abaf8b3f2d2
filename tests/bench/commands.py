"""CPU-seconds of commands in another checkout and in this one, side by side.

    git worktree add --detach OTHER ecb9df1b
    python tests/bench/commands.py --other OTHER [--cases import report demo tests ...] [--rounds 3]
    python tests/bench/commands.py --other OTHER --model DINOV2S --data CAMVID --cases sites study --rounds 1

Checkouts take turns, with one thread; all processes of a command count. Medians are printed, and exit statuses.
`report` is what it takes until it says that a folder has no runs; `tests` are those of `make test`, with one worker.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
# Arguments of Python: {demo} is the package that has the demo, {folder} is for what a command writes.
CASES = {
    "torch": ("-c", "import torch"),
    "import": ("-c", "import probes; probes.solve_features"),
    "report": ("-m", "probes", "report", "{folder}", "--out", "{folder}/page"),
    "sites": ("-m", "probes", "sites", "{model}"),
    "demo": ("-m", "{demo}", "demo", "--out", "{folder}"),
    "study": ("-m", "probes", "study", "{model}", "{data}", "--out", "{folder}", "--draws", "1"),
    "tests": ("-m", "pytest", "-q", "-n", "1", "--dist", "loadfile", "--no-loadscope-reorder"),
}


def absolute(path: str) -> Path:
    """Return a path that holds in any folder, since commands run in their checkout."""
    return Path(path).resolve()


def cpu_seconds(checkout: Path, arguments: list[str], log: Path) -> tuple[float, int]:
    """Run Python in a checkout, and return the CPU-seconds of all its processes and its exit status."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with log.open("w") as output:
        status = subprocess.run(
            [sys.executable, *arguments],
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        ).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return spent, status


def main() -> None:
    """Print a row for each case."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--other", type=absolute, required=True, help="the other checkout")
    parser.add_argument("--model", type=absolute, help="of sites and study")
    parser.add_argument("--data", type=absolute, help="of study, a folder of images and masks")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["torch", "import", "report"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=absolute, help="a new folder for what they write and print")
    args = parser.parse_args()
    for name in ("model", "data"):
        needed = [case for case in args.cases if f"{{{name}}}" in CASES[case]]
        if needed and getattr(args, name) is None:
            parser.error(f"{' and '.join(needed)} need --{name}")
    keep = args.keep or Path(tempfile.mkdtemp())
    print("case | other, CPU-s | this one | ratio | exit status", flush=True)
    for case in args.cases:
        found = {args.other: [], HERE: []}
        for turn in range(args.rounds):
            for name, checkout in zip(("other", "here"), found, strict=True):
                folder = keep / f"{case}-{name}-{turn}"
                folder.mkdir(parents=True)
                has_demo = (checkout / "probes" / "worlds").is_dir()
                known = vars(args) | {
                    "demo": "probes" if has_demo else "llava_bidir",
                    "folder": folder,
                }
                command = [word.format_map(known) for word in CASES[case]]
                log = keep / f"{folder.name}.log"
                found[checkout].append(cpu_seconds(checkout, command, log))
        other, here = (statistics.median(seconds for seconds, _ in x) for x in found.values())
        statuses = [[status for _, status in x] for x in found.values()]
        print(f"{case} | {other:.2f} | {here:.2f} | {here / other:.2f} | {statuses}", flush=True)


if __name__ == "__main__":
    main()
