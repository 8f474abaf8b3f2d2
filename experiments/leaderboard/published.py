"""DINOv2-S by our optimum and by published protocols on the same photos, and what each item of a protocol does.

    python -m experiments.leaderboard.published OUT --dinov2 DIR --data DATA/camvid DATA/labelmefacade

DIR is what `python -m experiments.real.import_dinov2 DIR` writes. Each arm is a run of `probes solve` or `fit` in
OUT/DATA/ARM, which a second call continues, and a row of OUT/published.csv. Arms that see the same pixels read them
once: states are kept in OUT/states, a gigabyte for 100 steps.

Analysis, fixed before the first run: of each arm the last validation and the best one, whose difference is what
selection adds. An item of the protocol is what the last validation loses or gains when it alone is changed. One seed,
so that less than a point is not told apart.
"""

import argparse
import csv
import hashlib
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from probes.cli import main as probes
from probes.models.frozen_encoder import FrozenEncoder
from probes.runs.read import ProbeRun

PX, STRIDE = 224, 149  # for 512 and 341
BATCH = 8  # for 16
SITES = ["layer_09", "final_norm"]  # the best one at 112 px, and that of the protocols
WARMUP = 1500 / 40000  # of the steps
# arm: preset, validations, what differs from it
FITTED = {"dinov3-linear": ("dinov3-linear", 8, ""), "dinov2-linear": ("dinov2-linear", 4, "")}
CROPS = ("random_scale", "max_class_share", "flip_probability", "photometric_hue")
ITEMS = {
    "no warm-up": "--model.warmup_steps null",
    "no batch norm": "--model.feature_norm none",
    "torch's first weights": "--model.init_std null",
    "layer 9": "--model.sites [layer_09]",
    "loss over labelled pixels": "--model.loss_average null",
    "no dropout": "--model.dropout 0",
    "no weight decay": "--model.weight_decay 0",
    "windows for crops": " ".join(f"--data.{option} null" for option in CROPS),
    "no photometric distortion": "--data.photometric_hue null",
}
SOLVED = {"optimum": "", "optimum, slide": f"--model.image_resize slide --model.stride_px {STRIDE}"}


def write_arm(arm: str, data: Path, args: argparse.Namespace) -> list[dict[str, str]]:
    """Return the rows of an arm, after its run."""
    out = args.out / data.name / arm.replace(" ", "_").replace(",", "").replace("'", "")
    places = f"--model.mllm {args.dinov2} --data.root {data} --data.dataset folder --out {out} --ckpt_path last"
    size = f"--model.image_px {PX} --data.num_workers 0 --trainer.accelerator cpu"
    if arm in SOLVED:
        sites = f"--model.sites {str(SITES).replace(' ', '')}"
        probes(["solve", *f"{places} {size} {sites} {SOLVED[arm]}".split()])
    else:
        preset, validations, changed = FITTED.get(arm) or ("dinov3-linear", 8, ITEMS[arm])
        warmup = max(round(args.steps * WARMUP), 1)
        steps = f"""--trainer.max_steps {args.steps} --trainer.val_check_interval {args.steps // validations}
            --model.warmup_steps {warmup} --model.stride_px {STRIDE} --data.batch_size {BATCH}
            --data.name {data.name} --trainer.enable_progress_bar false"""
        probes(["fit", "-c", preset, *f"{places} {size} {steps} {changed}".split()])
    rows = []
    for site in ProbeRun(out).metrics["sites"]:
        history = site.get("history") or [site["miou"]]
        scores = {"last": history[-1], "best": max(history)}
        named = {"data": data.name, "arm": arm, "site": site["site"]}
        rows.append(named | {name: f"{100 * score:.2f}" for name, score in scores.items()})
    return rows


class keep_states:
    """While this lasts, states of pixels that were seen before are read from a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        read = FrozenEncoder.states

        def states(model, pixels: Tensor, sites=None, **options) -> dict[str, Tensor]:
            if options or not {*(sites or ["?"])} <= {*SITES}:
                return read(model, pixels, sites, **options)
            file = folder / hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
            if not file.is_file():
                torch.save(read(model, pixels, SITES), file)
            kept = torch.load(file)
            return {site: kept[site] for site in sites}

        self.patch = patch.object(FrozenEncoder, "states", states)

    def __enter__(self) -> None:
        self.patch.start()

    def __exit__(self, *error) -> None:
        self.patch.stop()


def table_lines(file: Path) -> list[str]:
    """Return the lines of published.csv as Markdown: scores, what selection adds, and what an item changed."""
    with file.open(newline="") as content:
        rows = [*csv.DictReader(content)]
    whole = {row["data"]: float(row["last"]) for row in rows if row["arm"] == "dinov3-linear"}
    lines = []
    for row in rows:
        last, best = float(row["last"]), float(row["best"])
        changed, selected = "", ""
        if row["data"] in whole and row["arm"] != "dinov3-linear":
            changed = f"{last - whole[row['data']]:+.1f}"
        if row["arm"] not in SOLVED:
            selected = f"{best - last:+.1f}"
        scores = f"{last:.1f} | {selected} | {changed}".replace("-", "−").replace("|  |", "| |")
        lines.append(f"| {row['data']} | {row['arm']} | {row['site']} | {scores} |")
    return lines


def main() -> None:
    """Run what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--dinov2", required=True)
    parser.add_argument("--data", nargs="+", type=Path, required=True, help="items: of the first")
    parser.add_argument("--steps", type=int, default=48)
    args = parser.parse_args()
    first, *others = args.data
    arms = ["optimum", *FITTED]
    jobs = [(arm, first) for arm in (*arms, *ITEMS, "optimum, slide")]
    jobs += [(arm, data) for data in others for arm in arms]
    rows: list[dict[str, str]] = []
    with keep_states(args.out / "states"):
        for arm, data in jobs:
            rows += write_arm(arm, data, args)
            with (args.out / "published.csv").open("w", newline="") as file:
                table = csv.DictWriter(file, rows[0].keys())
                table.writeheader()
                table.writerows(rows)
            print(*table_lines(args.out / "published.csv"), sep="\n", flush=True)


if __name__ == "__main__":
    main()
