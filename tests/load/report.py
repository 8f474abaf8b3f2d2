"""The report on runs with many validation images: the size of its page, and the most memory that it takes.

    python tests/load/report.py --images 2000 --layers 32 --classes 150

Prints JSON. The runs are causal and bidirectional, trained and untrained, the trained ones with further recipes; their
counts are random, of `--images` images at 24 x 24 tokens.
"""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import tiny_models
import torch
from memory import peak_mb
from probe_runs import write_run
from safetensors.torch import load_file, save_file

from probes.cli import main as probes

GRID, DRAWN = (24, 24), 40
RECIPES = {"slow": {"learning_rate": 1e-4}, "fast": {"learning_rate": 1e-2}, "norm": {"feature_norm": "layernorm"}}


def write_study(root: Path, images: int, layers: int, classes: int) -> list[str]:
    data = tiny_models.write_segmentation(root / "data", 1, 1)
    names = {"classes": [f"class {k}" for k in range(classes)], "ignore_index": 255}
    (data / "classes.json").write_text(json.dumps(names))
    # down at the adapter, up again over the layers, the final norm as the last one
    quality = [0.6, 0.5, *(0.5 + 0.2 * i / layers for i in range(1, layers + 1)), 0.7]
    runs = []
    for mask, gain in (("causal", 0.0), ("bidirectional", 0.02)):
        for untrained in (False, True):
            curve = [0.5 * q if untrained else q + gain for q in quality]
            recipes = {} if untrained else {name: (settings, curve) for name, settings in RECIPES.items()}
            run = write_run(
                root / f"{mask}-{untrained}",
                curve,
                root=data,
                mask=mask,
                untrained=untrained,
                recipes=recipes,
                images=DRAWN,
                confusion=True,
                metrics={"grid": list(GRID)},
            )
            repeat_images(run, images // DRAWN)
            runs.append(str(run))
    return runs


def repeat_images(run: Path, times: int) -> None:
    """Writes a run's counts anew as if there were so many times its images, and a whole grid of tokens."""
    for file in run.glob("*.safetensors"):
        tensors = load_file(file)
        for name, counts in tensors.items():
            if name == "confusion":
                continue
            if name.startswith("patch"):
                counts = counts[..., :1].expand(*counts.shape[:-1], GRID[0] * GRID[1])
            tensors[name] = counts.repeat(*[1] * (counts.ndim - 2), times, 1)
        save_file(tensors, file)
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(metrics | {"images": metrics["images"] * times}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=2000, help=f"a multiple of {DRAWN}")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--classes", type=int, default=150)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        root, out = Path(folder), Path(folder) / "report"
        runs = write_study(root, args.images, args.layers, args.classes)
        small = write_study(root / "small", DRAWN, 2, 3)
        probes(["report", *small, "--out", str(root / "warm")])  # what the first report imports and allocates for good
        start, started = time.perf_counter(), time.process_time()
        peak = peak_mb(lambda: probes(["report", *runs, "--out", str(out)]))
        found = {
            "seconds": round(time.perf_counter() - start, 1),
            "cpu_seconds": round(time.process_time() - started, 1),
            "peak_mb": peak,
            "counts_mb": round(sum(f.stat().st_size for run in runs for f in Path(run).glob("*.safetensors")) / 1e6),
            "index_html_mb": round((out / "index.html").stat().st_size / 1e6, 2),
            "results_json_mb": round((out / "results.json").stat().st_size / 1e6, 2),
        }
    print(json.dumps(vars(args) | found, indent=1))


if __name__ == "__main__":
    main()
