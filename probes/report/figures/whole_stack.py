"""Figure of mIoU from the pixels to the last layer of the LLM: the encoder's own layers, the adapter, the LLM."""

from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes

from probes.analyses.style import (
    FigureData,
    Figures,
    ReportFigure,
    draw_intervals,
    mask_colour,
    new_axes,
    score_rows,
)
from probes.models.sites import ADAPTER, ENCODER, FINAL_NORM, is_encoder_layer, is_layer
from probes.results.probe_run import ProbeRun
from probes.results.study import CONTROLS, StudyRuns

LABELS = {ENCODER: "enc.", ADAPTER: "adapt."}
MOST_LABELS = 14


def stack_figures(study: StudyRuns) -> Figures:
    """Yield the curve from the pixels on, if the encoder's own layers were probed."""
    runs = {
        mask: run for mask, run in study.main_runs.items() if any(map(is_encoder_layer, run.sites))
    }
    if runs:
        yield ReportFigure(
            "stack",
            "From the pixels to the last layer",
            "mIoU of the probe at each layer of the encoder, at its output as the adapter reads it (enc.), at the "
            "adapter, and at each layer of the LLM. Encoder layer 0 are the patch embeddings. An encoder layer after "
            "the one that the adapter reads is a dead end: the LLM never sees it. Hollow points: random LLMs that "
            "change the states as much; they share encoder and adapter. Lines: 95% intervals.",
            stack_curve(runs, _random_llms(study, runs)),
            "wide",
        )


def _random_llms(study: StudyRuns, runs: dict[str, ProbeRun]) -> list[ProbeRun]:
    """Return the random LLMs under the masks of these runs, with the same kind of probes."""
    solved = next(iter(runs.values())).is_solved
    draws = study.draws(*CONTROLS["llm"], solved=solved)
    return [run for draw in draws for mask, run in draw.items() if mask in runs]


def stack_curve(runs: dict[str, ProbeRun], random: Iterable[ProbeRun] = ()) -> FigureData:
    """Draw mIoU at all sites but `final_norm`, which repeats the last layer, with intervals; one curve per mask.

    Args:
        runs: The trained model's, by mask.
        random: Random LLMs, drawn as points at the layers of the LLM.
    """
    figure, ax = new_axes(7.2, 3.4)
    sites = _in_forward_order(runs.values())
    for mask, run in runs.items():
        drawn = [entry for entry in run.metrics["sites"] if entry["site"] in sites]
        x = [sites.index(entry["site"]) for entry in drawn]
        draw_intervals(
            ax,
            x,
            [entry["miou"] for entry in drawn],
            [entry["miou_ci95"] for entry in drawn],
            mask_colour(mask),
            marker="o",
            ms=3,
            lw=1.4,
            label=mask,
        )
    for run in random:
        layers = [
            entry
            for entry in run.metrics["sites"]
            if is_layer(entry["site"]) and entry["site"] in sites
        ]
        ax.plot(
            [sites.index(entry["site"]) for entry in layers],
            [100 * entry["miou"] for entry in layers],
            "D",
            color=mask_colour(run.mask),
            mfc="none",
            ms=4,
            alpha=0.6,
        )
    _label_parts(ax, sites)
    ax.set_ylabel("mIoU (%)")
    ax.legend(fontsize=9)
    return FigureData(figure, score_rows([*runs.values(), *random]))


def _in_forward_order(runs: Iterable[ProbeRun]) -> list[str]:
    """Return the sites of all runs: encoder layers, encoder, adapter, LLM layers."""
    sites = {site for run in runs for site in run.sites if site != FINAL_NORM}
    in_encoder = sorted(filter(is_encoder_layer, sites))
    between = [site for site in (ENCODER, ADAPTER) if site in sites]
    return [*in_encoder, *between, *sorted(sites - {*in_encoder, *between})]


def _label_parts(ax: Axes, sites: list[str]) -> None:
    """Label the sites on the x axis by their numbers, and mark where encoder and LLM end."""
    step = -(-len(sites) // MOST_LABELS)
    shown = [i for i, site in enumerate(sites) if site in LABELS or i % step == 0]
    named = [i for i in shown if sites[i] in LABELS]
    if step > 1:  # a number beside "enc." or "adapt." would overlap it
        shown = [i for i in shown if i in named or not {i - 1, i + 1} & set(named)]

    def name(site: str) -> str:
        return LABELS.get(site) or str(int(site.rpartition("_")[2]))

    names = [name(sites[i]) for i in shown]
    ax.set_xticks(shown, names, fontsize=8)
    in_encoder = sum(map(is_encoder_layer, sites))
    before_llm = in_encoder + len(named)
    for edge in np.unique([in_encoder, before_llm]):
        if 0 < edge < len(sites):
            ax.axvline(
                edge - 0.5,
                color="black",
                lw=0.6,
                ls=":",
            )
    ax.set_xlabel("encoder layer, encoder and adapter, LLM layer")
