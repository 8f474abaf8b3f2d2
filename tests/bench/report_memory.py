"""Peak memory of `probes report` on a synthetic finished study of both masks and an untrained model.

python tests/bench/report_memory.py OUT --sites 34 --classes 150 --images 2000
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import probe_runs

from llava_bidir.common.bootstrap import RESAMPLINGS
from llava_bidir.common.files import write_files
from probes.score.effects import EFFECTS_FILE, effect_file, read_effect_file
from probes.score.estimate import Estimate

GRID = (24, 24)
# The peak of the process itself: what the kernel says of a child has that of its parent before it starts.
REPORT = """
import sys, time
from pathlib import Path
from probes.cli import main
main(sys.argv[1:])
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
peak = int(status["VmHWM"].split()[0]) / 1024
print(f"{time.process_time():.1f} CPU-s, peak {peak:.0f} MB")
"""
KINDS = {
    "causal": {},
    "bidirectional": {"mask": "bidirectional"},
    "untrained": {"untrained": True, "seed": 1},
}


def write_counts(path: Path, quality: list[float], labelled: torch.Tensor, seed: int) -> None:
    """Replace what a small run has counted by random counts of many images and classes, i64 as a run writes them."""
    rng = np.random.default_rng(seed)
    images, classes = labelled.shape
    tokens = GRID[0] * GRID[1]
    sites = len(quality)
    rates = [torch.from_numpy(rng.uniform(q - 0.3, q + 0.3, labelled.shape)) for q in quality]
    right = torch.stack([(labelled * rate).long() for rate in rates])
    wrong = torch.from_numpy(rng.integers(0, 120, (sites, images, classes)))
    tensors = {
        "intersection": right,
        "predicted": right + wrong,
        "labelled": labelled,
        "patch_right": torch.from_numpy(rng.integers(0, 300, (sites, images, tokens))),
        "patch_valid": torch.full((images, tokens), 300),
    }
    save_file(tensors, path / "counts.safetensors")


def write_effects(path: Path) -> None:
    """Give the effects of a small run as many resamplings as those of a real one."""
    effects = {}
    for i, (name, effect) in enumerate(read_effect_file(path / EFFECTS_FILE)[0].items()):
        noise = torch.randn(RESAMPLINGS, generator=torch.Generator().manual_seed(i))
        effects[name] = Estimate(effect.value, effect.value + 0.01 * noise)
    write_files({path / EFFECTS_FILE: effect_file(effects)})


def write_study(
    out: Path,
    sites: int,
    classes: int,
    images: int,
) -> list[Path]:
    """Write the runs of a study, and return their folders."""
    root = out / "data"
    root.mkdir(parents=True)
    palette = [[i % 256, 255 - i % 256, 7] for i in range(classes)]
    names = [f"class {i}" for i in range(classes)]
    (root / "classes.json").write_text(json.dumps({"classes": names, "palette": palette}))
    quality = [0.5 + 0.2 * min(i, sites - i) / sites for i in range(sites)]
    labelled = torch.from_numpy(np.random.default_rng(0).integers(20, 400, (images, classes)))
    paths = []
    for seed, (name, more) in enumerate(KINDS.items(), 1):
        path = probe_runs.write_run(
            out / name,
            quality,
            root=root,
            images=6,
            **more,
        )
        write_counts(path, quality, labelled, seed)
        write_effects(path)
        metrics = json.loads((path / "metrics.json").read_text())
        metrics |= {"images": images, "grid": list(GRID)}
        (path / "metrics.json").write_text(json.dumps(metrics))
        paths.append(path)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    for name, default in (("sites", 34), ("classes", 150), ("images", 2000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    write_study(
        args.out,
        args.sites,
        args.classes,
        args.images,
    )
    words = [sys.executable, "-c", REPORT, "report", args.out, "--out", args.out / "report"]
    subprocess.run([*map(str, words)], check=True)


if __name__ == "__main__":
    main()
