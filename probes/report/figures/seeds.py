"""Figure of mIoU by site over seeds, the first of a joint report."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from probes.analyses.style import (
    FigureData,
    Figures,
    ReportFigure,
    caption,
    label_sites,
    mask_colour,
    mask_panels,
    score_row,
    site_depth,
)
from probes.report.seeds import studies_by_model
from probes.results.formatting import run_columns
from probes.results.probe_run import ProbeRun
from probes.results.study import MASKS, Study

from .layer_curves import sites_by_depth

Runs = dict[str, list[ProbeRun]]  # by mask, one of each seed
Draws = dict[str, list[list[ProbeRun]]]  # by mask, those of each seed, which may have none


def seed_curves(seeds: list[int], trained: Runs, random: Draws) -> FigureData:
    """Draw mIoU per site: a thin line per seed, their mean, and the mean of all random LLMs of all seeds."""
    figure, axes = mask_panels(trained, 3.4)
    rows: list[dict[str, Any]] = []
    for ax, (mask, runs) in zip(axes, trained.items(), strict=True):
        _draw_seeds(ax, runs, random[mask], mask_colour(mask))
        for seed, run, draws in zip(seeds, runs, random[mask], strict=True):
            for one in (run, *draws):
                rows += [{"seed": seed} | run_columns(one) | score_row(entry) for entry in one.metrics["sites"]]
    return FigureData(figure, rows)


def _draw_seeds(ax: Axes, trained: list[ProbeRun], random: list[list[ProbeRun]], colour: str) -> None:
    """Draw the sites that all runs have; random LLMs, if each seed has one, only at layers: the rest is not random."""
    sites = _shared_sites(trained)
    depths, miou = [site_depth(site) for site in sites], np.array([_miou(run, sites) for run in trained])
    ax.plot(depths, miou.T, color=colour, lw=0.9, alpha=0.4)
    ax.plot(depths, miou.mean(0), "-o", color=colour, lw=2, ms=4, label=f"trained, mean of {len(trained)} seeds")
    if all(random):
        every_draw = [run for draws in random for run in draws]
        layers = [site for site in _shared_sites(every_draw) if site.startswith("layer_")]
        means = np.mean([np.mean([_miou(run, layers) for run in draws], 0) for draws in random], 0)
        ax.plot([site_depth(site) for site in layers], means, "D", color=colour, mfc="none", ms=6, label="random LLMs")
    label_sites(ax, sites, 8, fontsize=8)
    ax.legend(fontsize=8)


def _shared_sites(runs: list[ProbeRun]) -> list[str]:
    return [site for site in sites_by_depth(*runs) if all(site in run.sites for run in runs)]


def _miou(run: ProbeRun, sites: list[str]) -> list[float]:
    by_site = {entry["site"]: 100 * entry["miou"] for entry in run.metrics["sites"]}
    return [by_site[site] for site in sites]


def _runs_of_all_seeds(studies: list[Study], solved: bool) -> Runs:
    """Return the masks under which each seed has a run."""
    runs = {mask: [(study.solved if solved else study.trained).get(mask) for study in studies] for mask in MASKS}
    return {mask: of_mask for mask, of_mask in runs.items() if None not in of_mask}


def _random_llms(studies: list[Study], mask: str, solved: bool) -> list[list[ProbeRun]]:
    return [[draw[mask] for draw in study.random_draws("llm", solved) if mask in draw] for study in studies]


def seed_figures(studies: list[Study]) -> dict[tuple[str, str], list[ReportFigure]]:
    """Return the figure of each model and dataset with several seeds."""
    groups = studies_by_model(studies)
    return {key: [*_figures_of_seeds(number, groups[key])] for number, key in enumerate(groups, 1)}


def _figures_of_seeds(number: int, members: list[Study]) -> Figures:
    solved = all(study.solved for study in members)
    trained = _runs_of_all_seeds(members, solved)
    if not trained:
        return
    random = {mask: _random_llms(members, mask, solved) for mask in trained}
    probes = ", probes at their optimum" if solved else ""
    yield ReportFigure(
        f"seeds_{number}", f"Segmentation quality by layer{probes}",
        caption(
            "Segmentation quality of the probe at each site. Thin lines: seeds. Look for a drop from encoder to "
            "adapter and a rise over the LLM layers.",
            "Diamonds: random LLMs that change the states as much as the trained ones, means over draws and seeds; "
            "what they reach as well need not be learned." if any(map(all, random.values())) else "",
        ),
        seed_curves([study.seed for study in members], trained, random))  # fmt: skip
