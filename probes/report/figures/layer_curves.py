"""Figures of mIoU by site: encoder, adapter, LLM layers (Figs. 3, 8, 9, 10)."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from probes.analyses.style import (
    COLOURS,
    FigureData,
    Figures,
    ReportFigure,
    caption,
    draw_curve,
    has_depth,
    label_sites,
    mask_colour,
    new_axes,
    new_panels,
    score_row,
    score_rows,
    site_depth,
    spread_labels,
)
from probes.models.sites import ADAPTER, is_layer
from probes.results.probe_run import ProbeRun
from probes.results.study import CONTROLS, MASKS, UNTRAINED, StudyRuns, by_mask, runs_to_compare


def with_depth(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the entries of the sites that have a depth."""
    return [entry for entry in entries if has_depth(entry["site"])]


def depth_and_miou(entries: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """Return depths and mIoU in percent of the sites that have a depth."""
    entries = with_depth(entries)
    return [site_depth(entry["site"]) for entry in entries], [
        100 * entry["miou"] for entry in entries
    ]


def draw_miou(
    ax: Axes,
    run: ProbeRun,
    colour: str,
    **kwargs,
) -> None:
    """Draw a run's mIoU by site with its 95% intervals."""
    depth, miou = depth_and_miou(run.metrics["sites"])
    bands = [100 * np.array(entry["miou_ci95"]) for entry in with_depth(run.metrics["sites"])]
    draw_curve(ax, depth, miou, bands, colour, **kwargs)


def draw_run(
    ax: Axes,
    run: ProbeRun,
    colour: str,
    label: str,
    marker: str | None = None,
) -> None:
    """Draw a trained run's curve with its intervals, the best layer, and its gain over the adapter."""
    draw_miou(
        ax,
        run,
        colour,
        marker=marker,
        ms=4,
        label=label,
    )
    miou = {entry["site"]: entry["miou"] for entry in run.metrics["sites"]}
    peak = run.peak_layer
    if peak is not None and ADAPTER in miou:
        ax.axvline(
            site_depth(peak),
            color=colour,
            ls="--",
            lw=0.9,
            alpha=0.7,
        )
        ax.annotate(f"{100 * (miou[peak] - miou[ADAPTER]):+.1f}", (site_depth(peak), 100 * miou[peak]), (4, 5),
                    color=colour, textcoords="offset points", fontsize=9,)  # fmt: skip


def sites_by_depth(*runs: ProbeRun) -> list[str]:
    """Return the sites of all runs that have a depth, sorted by it."""
    sites = {site for run in runs for site in run.sites if has_depth(site)}
    return sorted(sites, key=site_depth)


def layer_curves(study: StudyRuns, solved: bool) -> FigureData:
    """Draw mIoU per site and mask, with the untrained control and random LLMs (Figs. 3, 8).

    `solved` draws the runs whose probes are solved, else those whose probes are trained.
    """
    trained = by_mask(study.where(arm="trained", solved=solved))
    untrained = by_mask(study.where(arm=UNTRAINED, solved=solved))
    random = [list(runs.values()) for runs in study.draws(*CONTROLS["llm"], solved=solved)]
    figure, ax = new_axes(6.4, 3.9)
    for mask, run in trained.items():
        marker = "os"[mask == "bidirectional"] if len(run.sites) < 20 else None
        draw_run(
            ax,
            run,
            mask_colour(mask),
            mask,
            marker,
        )
    for mask, run in untrained.items():
        label = f"{mask}, untrained"
        ax.plot(
            *depth_and_miou(run.metrics["sites"]),
            ":",
            color=mask_colour(mask),
            alpha=0.6,
            lw=1.8,
            label=label,
        )
    for draw, runs in enumerate(random):
        for run in runs:
            mask = run.mask
            _draw_random(ax, run, mask_colour(mask), f"{mask}, random LLM" if draw == 0 else None)
    adapters = _draw_random_adapters(ax, study, solved)
    runs = [*trained.values(), *untrained.values(), *(run for runs in random for run in runs)]
    runs += adapters
    label_sites(ax, sites_by_depth(*runs))
    ax.set(ylabel="mIoU (%)")
    ax.legend(fontsize=9)
    spread_labels(figure, [ax])
    return FigureData(figure, score_rows(runs))


def _draw_random(
    ax: Axes,
    run: ProbeRun,
    colour: str,
    label: str | None = None,
) -> None:
    """Draw the layers of a random LLM as hollow points; its encoder and adapter are those of the trained model."""
    depth, miou = depth_and_miou([x for x in run.metrics["sites"] if is_layer(x["site"])])
    ax.plot(
        depth,
        miou,
        "D",
        color=colour,
        mfc="none",
        ms=5,
        alpha=0.8,
        label=label,
    )


def _draw_random_adapters(ax: Axes, study: StudyRuns, solved: bool) -> list[ProbeRun]:
    """Draw the adapter of runs with a random one as grey diamonds; return these runs."""
    runs = [next(iter(draw.values())) for draw in study.draws("adapter", solved=solved)]
    for number, run in enumerate(runs):
        label = "random adapter" if number == 0 else None
        depth, miou = depth_and_miou([x for x in run.metrics["sites"] if x["site"] == ADAPTER])
        ax.plot(
            depth,
            miou,
            "D",
            color="#777777",
            mfc="none",
            ms=5,
            alpha=0.8,
            label=label,
        )
    return runs


def models_by_dataset(
    studies: list[StudyRuns], mask: str, over_adapter: bool = False
) -> FigureData:
    """Draw the curves of models with a run under the mask, one panel per dataset (Figs. 3, 9), and their random LLMs.

    `over_adapter` draws mIoU minus the adapter's instead (Fig. 10).
    """
    runs = [by_mask[mask] for by_mask in runs_to_compare(*studies)]
    labels = [
        study.model + suffix for study, suffix in zip(studies, _probes_suffixes(runs), strict=True)
    ]
    models = list(dict.fromkeys(labels))
    datasets = list(dict.fromkeys(study.dataset for study in studies))
    figure, axes = new_panels(len(datasets), height=3.6 if len(datasets) == 1 else 2.9, columns=2)
    panels = dict(zip(datasets, axes, strict=True))
    rows = []
    for study, run, label in zip(studies, runs, labels, strict=True):
        ax = panels[study.dataset]
        colour = COLOURS[models.index(label) % len(COLOURS)]
        common = {
            "model": study.model,
            "dataset": study.dataset,
            "image_attention": mask,
            "probes": run.probe_kind,
        }
        run_rows = [common | score_row(entry) for entry in run.metrics["sites"]]
        if over_adapter:
            adapter = next(row["miou"] for row in run_rows if row["site"] == ADAPTER)
            x, y = depth_and_miou(run_rows)
            ax.plot(
                x,
                [v - 100 * adapter for v in y],
                color=colour,
                lw=1.8,
                label=label,
            )
            run_rows = [row | {"over_adapter": row["miou"] - adapter} for row in run_rows]
        else:
            draw_run(ax, run, colour, label)
            for draw in study.draws(*CONTROLS["llm"], solved=run.is_solved):
                if mask in draw:
                    _draw_random(ax, draw[mask], colour)
        rows += run_rows
    for dataset, ax in panels.items():
        if over_adapter:
            ax.axhline(0, color="black", lw=0.8)
        shown = [run for study, run in zip(studies, runs, strict=True) if study.dataset == dataset]
        label_sites(ax, sites_by_depth(*shown), 8)
        ax.set_title(dataset, fontsize=10)
    lines = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], label=model)
        for i, model in enumerate(models)
    ]
    figure.legend(
        handles=lines,
        loc="outside lower center",
        ncols=2,
        fontsize=8,
    )
    axes[0].set_ylabel("mIoU minus the adapter's (pp)" if over_adapter else "mIoU (%)")
    spread_labels(figure, axes)
    return FigureData(figure, rows)


def _probes_suffixes(runs: list[ProbeRun]) -> list[str]:
    """Return the kind of probes of each run for a label; empty if all are of one kind."""
    mixed = len({run.is_solved for run in runs}) > 1
    return [f", {run.probe_kind} probes" if mixed else "" for run in runs]


def masks_by_model(studies: list[StudyRuns]) -> FigureData:
    """Draw causal and bidirectional curves, one panel per model and dataset (Fig. 8)."""
    figure, axes = new_panels(len(studies))
    solved = all(study.solved.keys() >= set(MASKS) for study in studies)
    pairs = [
        [study.solved[mask] for mask in MASKS] if solved else study.pair() for study in studies
    ]
    suffixes = _probes_suffixes([pair[0] for pair in pairs])
    rows = []
    for ax, study, pair, suffix in zip(axes, studies, pairs, suffixes, strict=True):
        for mask, run in zip(MASKS, pair, strict=True):
            draw_run(ax, run, mask_colour(mask), mask)
        label_sites(ax, sites_by_depth(*pair), 5, fontsize=8)
        ax.set_xlabel("")
        ax.set_title(f"{study.model}\n{study.dataset}{suffix}", fontsize=9)
        rows += [{"model": study.model, "dataset": study.dataset} | row for row in score_rows(pair)]
    axes[0].legend(fontsize=8)
    axes[0].set_ylabel("mIoU (%)")
    figure.supxlabel("encoder, adapter (0), LLM layer", fontsize=9)
    spread_labels(figure, axes)
    return FigureData(figure, rows)


def layer_figures(study: StudyRuns) -> Figures:
    """Yield the scores by layer: of solved probes, if there are any beside trained ones, and of the study's own."""
    solved_main = study.first.is_solved
    if study.solved and not solved_main:
        yield _layer_figure(
            study, "layers_solved", "Segmentation quality by layer, probes at their optimum", True
        )
    yield _layer_figure(study, "layers", "Segmentation quality by layer", solved_main)


def _layer_figure(
    study: StudyRuns,
    name: str,
    title: str,
    solved: bool,
) -> ReportFigure:
    return ReportFigure(
        name, title,
        caption(
            "Segmentation quality of the probe at each site (Figs. 3 and 8). The paper reports a drop from encoder to "
            "adapter and a rise over the LLM layers.", _peak_caption(study),
            "Dotted: the untrained model." if study.where(arm=UNTRAINED, solved=solved) else "",
            "Diamonds: random LLMs that change the states as much as the trained one; what they reach as well need "
            "not be learned." if study.where(arm=CONTROLS["llm"], solved=solved) else "", "Bands: 95% intervals.",
        ),
        layer_curves(study, solved))  # fmt: skip


def overview_figures(studies: list[StudyRuns]) -> Figures:
    """Yield the figures that compare several models and datasets; the first one has the mask of most models."""
    by_mask = {mask: [study for study in studies if mask in study.main_runs] for mask in MASKS}
    for mask, with_mask in sorted(by_mask.items(), key=lambda entry: -len(entry[1])):
        with_adapter = [study for study in with_mask if ADAPTER in study.main_runs[mask].sites]
        if with_mask:
            yield ReportFigure(
                f"models_{mask}", f"All models, {mask}",
                caption("mIoU by site, one line per model (Figs. 3 and 9).", _peak_caption(*with_mask),
                        _random_caption(with_mask),
                        _kinds_caption(with_mask), "Bands: 95% intervals.",),
                models_by_dataset(with_mask, mask))  # fmt: skip
        if with_adapter:
            yield ReportFigure(
                f"over_adapter_{mask}", f"Recovery of all models, {mask}",
                caption("The same curves minus their value at the adapter (Fig. 10), to compare models with different "
                        "depths and encoders.", _kinds_caption(with_adapter)),
                models_by_dataset(with_adapter, mask, over_adapter=True))  # fmt: skip
    both = [study for study in studies if study.pair()]
    if both:
        yield ReportFigure(
            "masks", "Causal and bidirectional attention",
            caption("Both masks of every model (Fig. 8).", _peak_caption(*both), _kinds_caption(both),
                    "Bands: 95% intervals."),
            masks_by_model(both))  # fmt: skip


def _random_caption(studies: list[StudyRuns]) -> str:
    random = [run for study in studies for run in study.where(arm=CONTROLS["llm"], solved=True)]
    return "Diamonds: its random LLMs." if random else ""


def _peak_caption(*studies: StudyRuns) -> str:
    runs = [run for study in studies for run in study.main_runs.values()]
    marked = any(ADAPTER in run.sites and len(run.layers) > 1 for run in runs)
    return (
        "Dashed: the best layer, with its difference from the adapter in percentage points."
        if marked
        else ""
    )


def _kinds_caption(studies: list[StudyRuns]) -> str:
    kinds = {run.is_solved for by_mask in runs_to_compare(*studies) for run in by_mask.values()}
    return (
        "Probes of some models are solved, of others trained: their heights cannot be compared."
        * (len(kinds) > 1)
    )
