"""How far a solved probe's mIoU depends on processor, threads, memory and processes.

    python -m experiments.statistics.reproduces MODEL DATA --sites layer_05 layer_10 final_norm --out runs/reproduces

Each setting is a run of `probes solve` with its defaults, in a process of its own. Prints strengths and mIoU of each
site by setting, and the largest difference at each site, in points.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ONE_THREAD = {"OMP_NUM_THREADS": "1"}


class Setting(NamedTuple):
    """Environment and options of a run."""

    environment: dict[str, str] = {}
    options: tuple[str, ...] = ()


SETTINGS = {
    "this processor, one thread": Setting(),
    "two threads": Setting({"OMP_NUM_THREADS": "2"}),
    "AVX2": Setting(
        {
            "ATEN_CPU_CAPABILITY": "avx2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        }
    ),
    "SSE4": Setting(
        {
            "ATEN_CPU_CAPABILITY": "default",
            "ONEDNN_MAX_CPU_ISA": "SSE41",
            "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        }
    ),
    "states in a file": Setting({}, ("--memory-gb", "0")),
    "two processes": Setting(
        {}, ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu")
    ),
}


def solve(setting: Setting, command: list[str], out: Path) -> list[dict]:
    """Return the entries of the sites, from a run that is made unless it is there."""
    options = list(setting.options)
    if not (out / "metrics.json").is_file():
        environment = os.environ | ONE_THREAD | setting.environment
        words = [sys.executable, "-m", "probes", "solve", *command, *options, "--out", str(out)]
        subprocess.run(words, env=environment, check=True, stderr=subprocess.DEVNULL)
    metrics = json.loads((out / "metrics.json").read_text())
    entries = metrics["path"]["optimum"]["sites"]
    scores = {site["site"]: site["miou"] for site in metrics["sites"]}
    return [entry | {"chosen_miou": 100 * scores[entry["site"]]} for entry in entries]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--sites", nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    command = ["-c", "folder", "--model.mllm", args.model, "--data.root", str(args.data)]
    command += ["--model.sites", f"[{', '.join(args.sites)}]", "--model.image_resize", "squash"]
    by_setting = {}
    for i, (name, setting) in enumerate(SETTINGS.items()):
        by_setting[name] = solve(setting, command, args.out / f"setting{i}")
        cells = [f"{entry['chosen']:.1e} {entry['chosen_miou']:.4f}" for entry in by_setting[name]]
        print(f"{name:28}", *cells, sep=" | ", flush=True)
    for i, site in enumerate(args.sites):
        scores = [entries[i]["chosen_miou"] for entries in by_setting.values()]
        strengths = {f"{entries[i]['chosen']:.1e}" for entries in by_setting.values()}
        first, second = sorted(by_setting["this processor, one thread"][i]["cv_cross_entropy"])[:2]
        print(
            f"{site}: largest difference {max(scores) - min(scores):.4f} points, strengths {', '.join(strengths)}; "
            f"the next one is {second - first:.4f} nats behind"
        )


if __name__ == "__main__":
    main()
