"""Figures of mIoU by site: encoder, adapter, LLM layers (Figs. 3, 8, 9, 10); layers of a bare encoder; from the pixels.

Each figure is a table of points, drawn by :func:`probes.analyses.style.curves`, and the looks of its curves.
"""

from collections.abc import Callable, Iterable
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
    curves,
    has_depth,
    label_layers,
    label_sites,
    mask_colour,
    new_axes,
    new_panels,
    site_depth,
    spread_labels,
)
from probes.models.sites import ADAPTER, ENCODER, FINAL_NORM, is_encoder_layer, is_layer
from probes.results.formatting import Rows, bounds, run_columns
from probes.results.probe_run import ProbeRun
from probes.results.study import CONTROLS, MASKS, UNTRAINED, StudyRuns, by_mask, runs_to_compare

MIOU = {"y": "miou", "band": ("miou_low", "miou_high"), "scale": 100}
# looks of curves
TRAINED = {"ms": 4, "band": True}
UNTRAINED_LINE = {"ls": ":", "lw": 1.8, "alpha": 0.6}
POINTS = {"ls": "", "marker": "D", "mfc": "none", "ms": 5, "alpha": 0.8}
GREY = "#777777"
DARK = "#444444"
# points of random encoders, by arm
RANDOM_ENCODERS = {
    "random": ("D", "random layers"),
    "random, unmatched": ("^", "untrained layers"),
    "permuted": ("s", "permuted weights"),
}
STACK_LABELS = {ENCODER: "enc.", ADAPTER: "adapt."}
MOST_STACK_LABELS = 14


# ------------------------------------------------------------------------------------------------ points
def score_rows(runs: Iterable[ProbeRun]) -> Rows:
    """Return the scores of runs as rows of a table, one for each run and site."""
    return [
        run_columns(run)
        | {key: entry[key] for key in ("site", "dim", "miou", "pacc", "best_epoch")}
        | bounds(entry["miou_ci95"], "miou_")
        for run in runs
        for entry in run.metrics["sites"]
    ]


def points_of(
    curve: str, run: ProbeRun, is_shown: Callable[[str], bool] = has_depth
) -> list[dict[str, Any]]:
    """Return the points of a run at the sites that have a depth and are shown, as points of a curve."""
    return [
        row | {"curve": curve, "depth": site_depth(row["site"])}
        for row in score_rows([run])
        if has_depth(row["site"]) and is_shown(row["site"])
    ]


def sites_of(points: Rows) -> list[str]:
    """Return the sites of points, sorted by depth."""
    return sorted({row["site"] for row in points}, key=site_depth)


def mark_best(ax: Axes, run: ProbeRun, colour: str) -> None:
    """Mark the best layer of a trained run, with its gain over the adapter."""
    miou = {entry["site"]: entry["miou"] for entry in run.metrics["sites"]}
    peak = run.peak_layer
    if peak is not None and ADAPTER in miou:
        _mark(
            ax,
            site_depth(peak),
            100 * miou[peak],
            f"{100 * (miou[peak] - miou[ADAPTER]):+.1f}",
            colour,
        )


def _mark(
    ax: Axes,
    x: float,
    y: float,
    text: str,
    colour: str,
) -> None:
    """Draw a dashed line at x, and a text beside the point."""
    ax.axvline(x, color=colour, ls="--", lw=0.9, alpha=0.7)
    offset = {"xytext": (4, 5), "textcoords": "offset points"}
    ax.annotate(text, (x, y), **offset, color=colour, fontsize=9)


# ------------------------------------------------------------------------------------------------ one study
def layer_curves(study: StudyRuns, solved: bool) -> FigureData:
    """Draw mIoU per site and mask, with the untrained control and random LLMs (Figs. 3, 8).

    `solved` draws the runs whose probes are solved, else those whose probes are trained.
    """
    trained = by_mask(study.where(arm="trained", solved=solved))
    untrained = by_mask(study.where(arm=UNTRAINED, solved=solved))
    random = [run for draw in study.draws(*CONTROLS["llm"], solved=solved) for run in draw.values()]
    adapters = [next(iter(draw.values())) for draw in study.draws("adapter", solved=solved)]
    points: Rows = []
    looks: dict[str, dict[str, Any]] = {}
    for mask, run in trained.items():
        points += points_of(mask, run)
        marker = "os"[mask == "bidirectional"] if len(run.sites) < 20 else None
        looks[mask] = TRAINED | {"color": mask_colour(mask), "marker": marker}
    for mask, run in untrained.items():
        name = f"{mask}, untrained"
        points += points_of(name, run)
        looks[name] = UNTRAINED_LINE | {"color": mask_colour(mask)}
    for run in random:  # encoder and adapter are those of the trained model
        name = f"{run.mask}, random LLM"
        points += points_of(name, run, is_layer)
        looks[name] = POINTS | {"color": mask_colour(run.mask)}
    for run in adapters:
        points += points_of("random adapter", run, lambda site: site == ADAPTER)
    looks["random adapter"] = POINTS | {"color": GREY}
    figure, ax = new_axes(6.4, 3.9)
    curves(ax, points, looks, **MIOU)
    for mask, run in trained.items():
        mark_best(ax, run, mask_colour(mask))
    label_sites(ax, sites_of(points))
    ax.set(ylabel="mIoU (%)")
    ax.legend(fontsize=9)
    spread_labels(figure, [ax])
    return FigureData(
        figure, score_rows([*trained.values(), *untrained.values(), *random, *adapters])
    )


def layer_figures(study: StudyRuns) -> Figures:
    """Yield the scores by layer: of solved probes, if there are any beside trained ones, and of the study's own."""
    title = "Segmentation quality by layer"
    if study.solved and not study.is_solved:
        yield _layer_figure(study, "layers_solved", f"{title}, probes at their optimum", True)
    yield _layer_figure(study, "layers", title, study.is_solved)


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


def _peak_caption(*studies: StudyRuns) -> str:
    runs = [run for study in studies for run in study.main_runs.values()]
    if any(ADAPTER in run.sites and len(run.layers) > 1 for run in runs):
        return "Dashed: the best layer, with its difference from the adapter in percentage points."
    return ""


# ------------------------------------------------------------------------------------------------ an encoder
def encoder_figures(study: StudyRuns) -> Figures:
    """Yield the scores by layer of a bare encoder."""
    arms = {run.arm for run in _random_encoders(study)}
    yield ReportFigure(
        "layers", "Segmentation quality by layer",
        caption(
            "mIoU of the probe at each layer; layer 0 are the patch embeddings. Dashed: the best layer.",
            "Star: the last layer after the model's norm." if FINAL_NORM in study.first.sites else "",
            "Diamonds: random layers that change the states as much as the trained ones; what they reach as well "
            "need not be learned." if "random" in arms else "",
            "Squares: the trained weights in random order." if "permuted" in arms else "", "Band: 95% intervals.",
        ),
        encoder_curve(study))  # fmt: skip


def encoder_curve(study: StudyRuns) -> FigureData:
    """Draw mIoU by layer of the trained encoder with its interval, and of random ones."""
    run = study.first
    random = _random_encoders(study)
    points = points_of("trained", run)
    looks = {"trained": TRAINED | {"color": COLOURS[0], "marker": "o"}}
    for other in random:
        marker, name = RANDOM_ENCODERS[other.arm]
        points += points_of(name, other)
        looks[name] = POINTS | {"color": DARK, "marker": marker}
    if FINAL_NORM in run.sites:
        (norm,) = (row for row in score_rows([run]) if row["site"] == FINAL_NORM)
        last = max((row["depth"] for row in points), default=0)
        points.append(norm | {"curve": "final norm", "depth": last})
        star = {"ls": "", "marker": "*", "mfc": "none", "ms": 9}
        looks["final norm"] = star | {"color": COLOURS[0]}
    figure, ax = new_axes(6.4, 3.9)
    curves(ax, points, looks, **MIOU)
    if run.peak_layer:
        miou = 100 * run.metrics["sites"][run.sites.index(run.peak_layer)]["miou"]
        _mark(ax, site_depth(run.peak_layer), miou, f"{miou:.1f}", COLOURS[0])
    label_layers(ax, list(filter(has_depth, run.sites)))
    ax.set_ylabel("mIoU (%)")
    ax.legend(fontsize=9)
    return FigureData(figure, score_rows([run, *random]))


def _random_encoders(study: StudyRuns) -> list[ProbeRun]:
    """Return the random encoders with the kind of probes of the trained one."""
    return [
        run
        for run in study.members
        if run.arm in RANDOM_ENCODERS and run.is_solved == study.is_solved
    ]


# ------------------------------------------------------------------------------------------------ from the pixels
def stack_figures(study: StudyRuns) -> Figures:
    """Yield the curve from the pixels on, if the encoder's own layers were probed."""
    runs = {
        mask: run for mask, run in study.main_runs.items() if any(map(is_encoder_layer, run.sites))
    }
    if runs:
        draws = study.draws(*CONTROLS["llm"], solved=study.is_solved)
        random = [run for draw in draws for mask, run in draw.items() if mask in runs]
        yield ReportFigure(
            "stack", "From the pixels to the last layer",
            "mIoU of the probe at each layer of the encoder, at its output as the adapter reads it (enc.), at the "
            "adapter, and at each layer of the LLM. Encoder layer 0 are the patch embeddings. An encoder layer after "
            "the one that the adapter reads is a dead end: the LLM never sees it. Hollow points: random LLMs that "
            "change the states as much; they share encoder and adapter. Bands: 95% intervals.",
            stack_curve(runs, random), "wide")  # fmt: skip


def stack_curve(runs: dict[str, ProbeRun], random: Iterable[ProbeRun] = ()) -> FigureData:
    """Draw mIoU at all sites but `final_norm`, which repeats the last layer, with intervals; one curve per mask.

    Args:
        runs: The trained model's, by mask.
        random: Random LLMs, drawn as points at the layers of the LLM.
    """
    random = list(random)
    sites = _in_forward_order(runs.values())
    points: Rows = []
    looks: dict[str, dict[str, Any]] = {}
    for run in runs.values():
        points += [row | {"curve": run.mask} for row in score_rows([run])]
        look = {"color": mask_colour(run.mask), "marker": "o", "ms": 3, "lw": 1.4}
        looks[run.mask] = look | {"band": True}
    for run in random:
        name = f"{run.mask}, random LLM"
        points += [row | {"curve": name} for row in score_rows([run]) if is_layer(row["site"])]
        looks[name] = POINTS | {"color": mask_colour(run.mask), "ms": 4, "alpha": 0.6}
    points = [row | {"place": sites.index(row["site"])} for row in points if row["site"] in sites]
    figure, ax = new_axes(7.2, 3.4)
    curves(ax, points, looks, x="place", **MIOU)
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
    step = -(-len(sites) // MOST_STACK_LABELS)
    shown = [i for i, site in enumerate(sites) if site in STACK_LABELS or i % step == 0]
    named = [i for i in shown if sites[i] in STACK_LABELS]
    if step > 1:  # a number beside "enc." or "adapt." would overlap it
        shown = [i for i in shown if i in named or not {i - 1, i + 1} & set(named)]

    def name(site: str) -> str:
        return STACK_LABELS.get(site) or str(int(site.rpartition("_")[2]))

    ax.set_xticks(shown, [name(sites[i]) for i in shown], fontsize=8)
    in_encoder = sum(map(is_encoder_layer, sites))
    for edge in np.unique([in_encoder, in_encoder + len(named)]):
        if 0 < edge < len(sites):
            ax.axvline(edge - 0.5, color="black", lw=0.6, ls=":")
    ax.set_xlabel("encoder layer, encoder and adapter, LLM layer")


# ------------------------------------------------------------------------------------------------ several models
def models_by_dataset(
    studies: list[StudyRuns], mask: str, over_adapter: bool = False
) -> FigureData:
    """Draw the curves of models with a run under the mask, one panel per dataset (Figs. 3, 9), and their random LLMs.

    `over_adapter` draws mIoU minus the adapter's instead (Fig. 10).
    """
    runs = [of_study[mask] for of_study in runs_to_compare(*studies)]
    names = [f"{s.model}{kind}" for s, kind in zip(studies, _kinds_of_probes(runs), strict=True)]
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(names))}
    datasets = list(dict.fromkeys(study.dataset for study in studies))
    figure, axes = new_panels(len(datasets), height=3.6 if len(datasets) == 1 else 2.9, columns=2)
    panels = dict(zip(datasets, axes, strict=True))
    points: dict[str, Rows] = {dataset: [] for dataset in datasets}
    looks: dict[str, dict[str, Any]] = {}
    rows: Rows = []
    for study, run, name in zip(studies, runs, names, strict=True):
        of_model = points_of(name, run)
        scores = score_rows([run])
        look = {"color": colours[name]}
        if over_adapter:
            of_model, scores = _over_adapter(of_model), _over_adapter(scores)
            looks[name] = look
        else:
            looks |= {name: TRAINED | look, f"{name}, random": POINTS | look}
            for draw in study.draws(*CONTROLS["llm"], solved=run.is_solved):
                if mask in draw:
                    of_model += points_of(f"{name}, random", draw[mask], is_layer)
            mark_best(panels[study.dataset], run, colours[name])
        points[study.dataset] += of_model
        rows += [{"model": study.model, "dataset": study.dataset} | row for row in scores]
    for dataset, ax in panels.items():
        columns = {"y": "over_adapter", "scale": 100} if over_adapter else MIOU
        curves(ax, points[dataset], looks, **columns)
        if over_adapter:
            ax.axhline(0, color="black", lw=0.8)
        label_sites(ax, sites_of(points[dataset]), 8)
        ax.set_title(dataset, fontsize=10)
    lines = [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=2, fontsize=8)
    axes[0].set_ylabel("mIoU minus the adapter's (pp)" if over_adapter else "mIoU (%)")
    spread_labels(figure, axes)
    return FigureData(figure, rows)


def _over_adapter(rows: Rows) -> Rows:
    """Return the rows of a run with the column "over_adapter", mIoU minus the adapter's."""
    adapter = next(row["miou"] for row in rows if row["site"] == ADAPTER)
    return [row | {"over_adapter": row["miou"] - adapter} for row in rows]


def _kinds_of_probes(runs: list[ProbeRun]) -> list[str]:
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
    kinds = _kinds_of_probes([pair[0] for pair in pairs])
    looks = {mask: TRAINED | {"color": mask_colour(mask)} for mask in MASKS}
    rows: Rows = []
    for ax, study, pair, kind in zip(axes, studies, pairs, kinds, strict=True):
        points = [row for run in pair for row in points_of(run.mask, run)]
        curves(ax, points, looks, **MIOU)
        for run in pair:
            mark_best(ax, run, mask_colour(run.mask))
        label_sites(ax, sites_of(points), 5, fontsize=8)
        ax.set_xlabel("")
        ax.set_title(f"{study.model}\n{study.dataset}{kind}", fontsize=9)
        rows += [{"model": study.model, "dataset": study.dataset} | row for row in score_rows(pair)]
    axes[0].legend(fontsize=8)
    axes[0].set_ylabel("mIoU (%)")
    figure.supxlabel("encoder, adapter (0), LLM layer", fontsize=9)
    spread_labels(figure, axes)
    return FigureData(figure, rows)


def overview_figures(studies: list[StudyRuns]) -> Figures:
    """Yield the figures that compare several models and datasets; the first one has the mask of most models."""
    by_mask = {mask: [study for study in studies if mask in study.main_runs] for mask in MASKS}
    for mask, with_mask in sorted(by_mask.items(), key=lambda entry: -len(entry[1])):
        with_adapter = [study for study in with_mask if ADAPTER in study.main_runs[mask].sites]
        if with_mask:
            random = [x for s in with_mask for x in s.where(arm=CONTROLS["llm"], solved=True)]
            yield ReportFigure(
                f"models_{mask}", f"All models, {mask}",
                caption("mIoU by site, one line per model (Figs. 3 and 9).", _peak_caption(*with_mask),
                        "Diamonds: its random LLMs." if random else "",
                        _kinds_caption(with_mask), "Bands: 95% intervals."),
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


def _kinds_caption(studies: list[StudyRuns]) -> str:
    runs = [run for by_mask in runs_to_compare(*studies) for run in by_mask.values()]
    if len({run.is_solved for run in runs}) == 1:
        return ""
    return "Probes of some models are solved, of others trained: their heights cannot be compared."
