"""Figures of mIoU by site: encoder, adapter, LLM layers (Figs. 3, 8); layers of a bare encoder; from the pixels.

Each figure is a table of points, drawn by :func:`probes.analyses.style.curves`, and the looks of its curves.
"""

from collections.abc import Callable, Iterable

import numpy as np
from matplotlib.axes import Axes

from probes.analyses.style import (
    COLOURS,
    FigureData,
    Figures,
    Looks,
    ReportFigure,
    caption,
    curves,
    has_depth,
    label_layers,
    label_sites,
    mask_colour,
    new_axes,
    site_depth,
    spread_labels,
)
from probes.models.sites import ADAPTER, ENCODER, FINAL_NORM, is_encoder_layer, is_layer
from probes.runs.formatting import Rows, bounds, run_columns
from probes.runs.probe_run import ProbeRun
from probes.runs.study import CONTROLS, UNTRAINED, StudyRuns, by_mask

MIOU = {
    "y": "miou",
    "band": ("miou_low", "miou_high"),
    "scale": 100,
}
# looks of curves
TRAINED = {"ms": 4, "band": True}
UNTRAINED_LINE = {
    "ls": ":",
    "lw": 1.8,
    "alpha": 0.6,
}
POINTS = {
    "ls": "",
    "marker": "D",
    "mfc": "none",
    "ms": 5,
    "alpha": 0.8,
}
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


def points_of(curve: str, run: ProbeRun, is_shown: Callable[[str], bool] = has_depth) -> Rows:
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
    ax.axvline(
        x,
        color=colour,
        ls="--",
        lw=0.9,
        alpha=0.7,
    )
    offset = {"xytext": (4, 5), "textcoords": "offset points"}
    ax.annotate(
        text,
        (x, y),
        **offset,
        color=colour,
        fontsize=9,
    )


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
    looks: Looks = {}
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
            "adapter and a rise over the LLM layers.", peak_caption(study),
            "Dotted: the untrained model." if study.where(arm=UNTRAINED, solved=solved) else "",
            "Diamonds: random LLMs that change the states as much as the trained one; what they reach as well need "
            "not be learned." if study.where(arm=CONTROLS["llm"], solved=solved) else "", "Bands: 95% intervals.",
        ),
        layer_curves(study, solved))  # fmt: skip


def peak_caption(*studies: StudyRuns) -> str:
    """Return what the dashed lines are, "" without such."""
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
        star = {
            "ls": "",
            "marker": "*",
            "mfc": "none",
            "ms": 9,
        }
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
    """Draw mIoU from the pixels to the last layer with intervals, without `final_norm`; one curve per mask.

    Args:
        runs: The trained model's, by mask.
        random: Random LLMs, drawn as points at the layers of the LLM.
    """
    random = list(random)
    sites = _in_forward_order(runs.values())
    points: Rows = []
    looks: Looks = {}
    for run in runs.values():
        points += [row | {"curve": run.mask} for row in score_rows([run])]
        look = {
            "color": mask_colour(run.mask),
            "marker": "o",
            "ms": 3,
            "lw": 1.4,
        }
        looks[run.mask] = look | {"band": True}
    for run in random:
        name = f"{run.mask}, random LLM"
        points += [row | {"curve": name} for row in score_rows([run]) if is_layer(row["site"])]
        looks[name] = POINTS | {
            "color": mask_colour(run.mask),
            "ms": 4,
            "alpha": 0.6,
        }
    points = [row | {"place": sites.index(row["site"])} for row in points if row["site"] in sites]
    figure, ax = new_axes(7.2, 3.4)
    curves(ax, points, looks, x="place", **MIOU)
    _label_parts(ax, sites)
    ax.set_ylabel("mIoU (%)")
    ax.legend(fontsize=9)
    return FigureData(figure, score_rows([*runs.values(), *random]))


def _in_forward_order(runs: Iterable[ProbeRun]) -> list[str]:
    """Return the sites of all runs from the pixels to the last layer: encoder layers, encoder, adapter, LLM layers."""
    sites = {x for run in runs for x in run.sites if has_depth(x) or is_encoder_layer(x)}
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
            ax.axvline(
                edge - 0.5,
                color="black",
                lw=0.6,
                ls=":",
            )
    ax.set_xlabel("encoder layer, encoder and adapter, LLM layer")
