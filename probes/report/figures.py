"""The paper's figures, drawn from a study. Each function returns a matplotlib figure and the rows behind it.

Colours are Okabe and Ito's, told apart by colour-blind readers; lines also differ in dash and marker.
"""

from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..analyses.knockout import read_cases
from ..mllm import ADAPTER, ENCODER, FINAL_NORM
from ..palette import coloured
from ..results import ProbeRun, peak_layer
from ..statistics import interval
from .study import Rows, Study, optional_json, optional_tensors

MASK_COLOURS = {"causal": "#0072B2", "bidirectional": "#D55E00"}
CONDITION_STYLES = {
    "none": ("#444444", "-", "nothing hidden"),
    "incorrect": ("#CC3311", "-", "wrong class hidden"),
    "correct": ("#0072B2", "-", "right class hidden"),
    "random_incorrect": ("#EE9988", ":", "as many at random (as wrong)"),
    "random_correct": ("#77BBDD", ":", "as many at random (as right)"),
}
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "svg.hashsalt": "llava-bidir",  # the same figure gives the same bytes
}


class Drawn(NamedTuple):
    figure: Figure
    rows: Rows


def colour_of(mask: str) -> str:
    return MASK_COLOURS.get(mask, "#009E73")


def _axes(width: float, height: float, columns: int = 1, **kwargs) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, **kwargs)


def _site_label(site: str) -> str:
    return {ENCODER: "enc.", ADAPTER: "adapt."}.get(site) or str(int(site.removeprefix("layer_")))


def _curve_sites(run: ProbeRun) -> list[str]:
    return [site for site in run.sites if site != FINAL_NORM]


def layer_curves(study: Study) -> Drawn:
    """mIoU at every site under both masks, with the untrained control (Figs. 3, 8)."""
    figure, ax = _axes(6.4, 3.9)
    rows = []
    for untrained, runs in ((False, study.trained), (True, study.untrained)):
        for mask, run in runs.items():
            entries = [entry for entry in run.metrics["sites"] if entry["site"] != FINAL_NORM]
            x, y = np.arange(len(entries)), np.array([entry["miou"] for entry in entries])
            low, high = np.array([entry["miou_ci95"] for entry in entries]).T
            colour = colour_of(mask)
            label = f"{mask}, untrained" if untrained else mask
            ax.plot(x, 100 * y, ":" if untrained else "-", color=colour, alpha=0.6 if untrained else 1, lw=1.8,
                    marker=None if untrained else "os"[mask == "bidirectional"], ms=4, label=label)  # fmt: skip
            if not untrained:
                ax.fill_between(x, 100 * low, 100 * high, color=colour, alpha=0.12, lw=0)
                _mark_peak(ax, run, colour)
            rows += [{"image_attention": mask, "untrained": untrained, **_score_row(e)} for e in run.metrics["sites"]]
    sites = _curve_sites(study.first)
    ax.set_xticks(range(len(sites)), _thinned([_site_label(site) for site in sites]))
    ax.set(xlabel="encoder, adapter, LLM layer", ylabel="mIoU (%)")
    ax.legend(fontsize=9)
    return Drawn(figure, rows)


def _mark_peak(ax: Axes, run: ProbeRun, colour: str) -> None:
    """A dashed line at the best layer, with what it gains over the adapter."""
    miou = {entry["site"]: entry["miou"] for entry in run.metrics["sites"]}
    peak = peak_layer(miou)
    if peak is None or ADAPTER not in miou:
        return
    x = _curve_sites(run).index(peak)
    ax.axvline(x, color=colour, ls="--", lw=0.9, alpha=0.7)
    ax.annotate(f"{100 * (miou[peak] - miou[ADAPTER]):+.1f}", (x, 100 * miou[peak]), (4, 5), color=colour,
                textcoords="offset points", fontsize=9)  # fmt: skip


def _score_row(entry: dict[str, Any]) -> dict[str, Any]:
    (low, high), keys = entry["miou_ci95"], ("site", "dim", "miou", "pacc", "best_epoch")
    return {key: entry[key] for key in keys} | {"miou_low": low, "miou_high": high}


def _thinned(labels: list[str], most: int = 12) -> list[str]:
    """Labels with some left blank, so that those of a deep model do not run into each other."""
    step = -(-len(labels) // most)
    return [label if i < 2 or (i - 1) % step == 0 else "" for i, label in enumerate(labels)]


def probe_budget(study: Study) -> Drawn:
    """The same curve after fewer epochs of probe training, and by longer-trained probes (App. A.2)."""
    figure, axes = _axes(6.6, 3.5, len(study.trained), sharey=True, squeeze=False)
    rows = []
    for ax, (mask, run) in zip(axes[0], study.trained.items(), strict=True):
        sites = _curve_sites(run)
        epochs = run.metrics["probe"]["epochs"]
        history = {entry["site"]: entry["history"] for entry in run.metrics["sites"]}
        for epoch in sorted({1, min(2, epochs), max(1, epochs // 2), epochs}):
            curve = [100 * history[site][epoch - 1] for site in sites if history[site]]
            shade = 0.25 + 0.75 * epoch / epochs
            ax.plot(curve, color=colour_of(mask), alpha=shade, marker="o", ms=3, label=f"epoch {epoch}")
        if mask in study.longer:
            longer = {entry["site"]: 100 * entry["miou"] for entry in study.longer[mask].metrics["sites"]}
            label = f"{study.longer[mask].metrics['probe']['epochs']} epochs"
            ax.plot([longer[site] for site in sites], "--", color="black", lw=1.2, label=label)
        ax.set_xticks(range(len(sites)), _thinned([_site_label(site) for site in sites], 8), fontsize=8)
        ax.set_title(mask, fontsize=10)
        ax.legend(fontsize=8)
        rows += [
            {"image_attention": mask, "run_epochs": found.metrics["probe"]["epochs"], "site": entry["site"]}
            | {"epoch": i + 1, "miou": miou}
            for found in (run, study.longer.get(mask))
            if found is not None
            for entry in found.metrics["sites"]
            for i, miou in enumerate(entry["history"])
        ]
    axes[0, 0].set_ylabel("validation mIoU (%)")
    return Drawn(figure, rows)


def starvation_curve(facts: dict[str, Any], patches: int = 50) -> Drawn:
    """Accuracy gap of the first patches in raster order (Fig. 7)."""
    figure, ax = _axes(6.4, 3.3)
    shown = min(patches, len(facts["gap"]))
    x, gap = np.arange(shown), 100 * np.array(facts["gap"][:shown])
    low, high = 100 * np.array(facts["gap_ci95"][:shown]).T
    ax.bar(x, gap, color=colour_of("bidirectional"), alpha=0.75, width=0.85)
    ax.vlines(x, low, high, color="#555555", lw=0.8)
    ax.axhline(0, color="black", lw=0.8)
    for row in range(facts["grid"][1], shown, facts["grid"][1]):
        ax.axvline(row - 0.5, color="#999999", lw=0.6, ls=":")
    ax.set(xlabel="patch, in raster order (dotted: a new row)", ylabel="bidirectional − causal (pp)")
    keys = ("causal", "bidirectional", "gap")
    rows = [
        {"patch": i, **{key: facts[key][i] for key in keys}, "gap_low": interval[0], "gap_high": interval[1]}
        for i, interval in enumerate(facts["gap_ci95"])
    ]
    return Drawn(figure, rows)


def starvation_grid(facts: dict[str, Any]) -> Drawn:
    """The same gap where it lies in the image."""
    figure, ax = _axes(4.2, 3.3)
    gap = 100 * np.array(facts["gap"]).reshape(facts["grid"])
    most = max(1.0, abs(gap).max())
    image = ax.imshow(gap, cmap="PuOr_r", norm=TwoSlopeNorm(0, -most, most))
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    figure.colorbar(image, ax=ax, label="bidirectional − causal (pp)")
    return Drawn(figure, [])


def knockout_curves(run: ProbeRun, min_patches: int) -> Drawn:
    """Wrong patches left by layer under each condition, over all classes (Fig. 11)."""
    figure, ax = _axes(4.4, 3.5)
    rows = _draw_remaining(ax, run, min_patches, None, list(CONDITION_STYLES))
    ax.set(xlabel="LLM layer (0 = adapter)", ylabel="wrong patches left (%)")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return Drawn(figure, rows)


def knockout_by_class(run: ProbeRun, min_patches: int) -> Drawn:
    """The same, class by class, without the random controls."""
    names = [entry["class"] for entry in optional_json(run, "knockout.json")["classes"]]
    columns = min(4, len(names))
    figure = Figure(figsize=(6.6, 1.9 * -(-len(names) // columns)), layout="constrained")
    axes = figure.subplots(-(-len(names) // columns), columns, sharex=True, squeeze=False)
    rows = []
    for ax, name in zip(axes.flat, names, strict=False):
        rows += _draw_remaining(ax, run, min_patches, name, ["none", "incorrect", "correct"])
        cases = read_cases(run, min_patches, [name])
        ax.set_title(f"{name} ({0 if cases is None else len(cases.images)} images)", fontsize=8)
        ax.tick_params(labelsize=7)
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    figure.supylabel("wrong patches left (%)", fontsize=9)
    figure.supxlabel("LLM layer (0 = adapter)", fontsize=9)
    return Drawn(figure, rows)


def _draw_remaining(ax: Axes, run: ProbeRun, min_patches: int, name: str | None, conditions: list[str]) -> Rows:
    """Draws n_c(l) / n_c(0) of one class, or of all, with intervals over images; returns the rows behind it."""
    cases = read_cases(run, min_patches, None if name is None else [name])
    ax.xaxis.get_major_locator().set_params(integer=True)
    if cases is None:
        ax.text(0.5, 0.5, "no such image", ha="center", transform=ax.transAxes, fontsize=8)
        return []
    rows = []
    for condition in conditions:
        colour, dash, label = CONDITION_STYLES[condition]
        mean, resampled = cases.mean(cases.rates[condition], run.metrics["images"], run.metrics["seed"])
        low, high = np.array([interval(m, resampled[:, i]) for i, m in enumerate(mean.tolist())]).T
        ax.plot(100 * mean, dash, color=colour, label=label, lw=1.8)
        if dash == "-":
            ax.fill_between(range(len(mean)), 100 * low, 100 * high, color=colour, alpha=0.12, lw=0)
        facts = {"image_attention": run.metrics["image_attention"], "class": name or "all", "condition": condition}
        rows += [
            facts | {"layer": layer, "cases": len(cases.images), "remaining": m, "low": lo, "high": hi}
            for layer, (m, lo, hi) in enumerate(zip(mean.tolist(), low.tolist(), high.tolist(), strict=True))
        ]
    return rows


def knockout_selection(rows: Rows, mask: str, claimed_at: int) -> Drawn:
    """The knockout's two effects by how many patches an image must have wrong to count."""
    figure, ax = _axes(4.4, 3.3)
    for effect, condition in (("knockout_incorrect", "incorrect"), ("knockout_correct", "correct")):
        points = [row for row in rows if row["image_attention"] == mask and row["effect"] == effect]
        x, y = [row["min_patches"] for row in points], 100 * np.array([row["value"] for row in points])
        low, high = 100 * np.array([[row["low"], row["high"]] for row in points]).T
        colour, _, label = CONDITION_STYLES[condition]
        ax.errorbar(x, y, [y - low, high - y], color=colour, label=label, marker="o", ms=4, capsize=2, lw=1.5)
    ax.axhline(0, color="black", lw=0.8)
    ax.axvline(claimed_at, color="#888888", ls="--", lw=0.9)
    ax.set(xlabel="patches that must be wrong at the adapter", ylabel="change in wrong patches left (pp)")
    ax.legend(fontsize=8)
    return Drawn(figure, [row for row in rows if row["image_attention"] == mask])


def umap_panels(facts: dict[str, Any], classes: list[str], palette: np.ndarray) -> Drawn:
    """The patches of one image in two dimensions, by site; classes beyond the four commonest in grey (Fig. 5)."""
    figure, axes = _axes(6.6, 2.9, len(facts["sites"]), squeeze=False)
    labels = np.array(facts["labels"])
    common = [
        k for k in np.argsort(-np.bincount(labels[labels >= 0], minlength=len(classes)))[:4] if (labels == k).any()
    ]
    rows = []
    for ax, entry in zip(axes[0], facts["sites"], strict=True):
        xy = np.array(entry["xy"])
        rest = ~np.isin(labels, common)
        ax.scatter(*xy[rest].T, s=14, c="#CCCCCC", label="other")
        for k in common:
            ax.scatter(*xy[labels == k].T, s=18, color=palette[k] / 255, edgecolor="#333333", lw=0.3, label=classes[k])
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set(visible=True, color="#CCCCCC")
        ax.set_title(f"{entry['site']}\nneighbours of the same class {entry['knn_purity']:.0%}", fontsize=8)
        rows += [
            {"site": entry["site"], "patch": i, "label": int(labels[i]), "x": x, "y": y}
            for i, (x, y) in enumerate(entry["xy"])
        ]
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    return Drawn(figure, rows)


def site_maps(run: ProbeRun, palette: np.ndarray) -> Drawn:
    """Image, truth, and the probes' predictions from encoder to the best layer (Figs. 4, 13)."""
    facts, maps = optional_json(run, "maps.json"), optional_tensors(run, "maps.safetensors")
    dataset = run.dataset()
    peak = peak_layer({entry["site"]: entry["miou"] for entry in run.metrics["sites"]})
    layers = run.layers[1:]
    sites = list(dict.fromkeys([ENCODER, ADAPTER, layers[0], layers[layers.index(peak) // 2], peak]))
    pictures = []
    for image in facts["images"]:
        sample, predicted = dataset[image["index"]], maps[f"image/{image['index']}"].numpy()
        pictures.append(
            [np.asarray(sample["image"]), coloured(sample["target"], palette)]
            + [coloured(predicted[facts["sites"].index(site)], palette) for site in sites]
        )
    figure = _picture_grid(pictures, ["image", "truth", *(site.replace("_", " ") for site in sites)])
    return Drawn(_with_legend(figure, run, palette), [])


def knockout_maps(run: ProbeRun, name: str, palette: np.ndarray) -> Drawn:
    """One image layer by layer: nothing hidden, the wrong class hidden, the right class hidden (Figs. 6, 12)."""
    facts, maps = optional_json(run, "maps.json"), optional_tensors(run, "maps.safetensors")
    (case,) = [case for case in facts["knockout"] if case["class"] == name]
    sample, predicted = run.dataset()[case["image"]], maps[f"knockout/{name}"].numpy()
    shown = np.unique(np.linspace(0, predicted.shape[1] - 1, 7).round().astype(int))
    left = [
        np.asarray(sample["image"]),
        coloured(sample["target"], palette),
        np.full((*sample["target"].shape, 3), 255),
    ]
    pictures = [[left[i], *(coloured(predicted[i, layer], palette) for layer in shown)] for i in range(3)]
    titles = ["image / truth", *("adapter" if layer == 0 else f"layer {layer}" for layer in shown)]
    rows = ["nothing\nhidden", f"{name}\nhidden", f"{case['correct_class']}\nhidden"]
    return Drawn(_with_legend(_picture_grid(pictures, titles, rows), run, palette), [])


def _picture_grid(pictures: list[list[np.ndarray]], titles: list[str], rows: list[str] | None = None) -> Figure:
    figure = Figure(figsize=(1.25 * len(titles) + 0.4, 1.3 * len(pictures) + 0.7), layout="constrained")
    axes = figure.subplots(len(pictures), len(titles), squeeze=False)
    for i, line in enumerate(pictures):
        for ax, picture in zip(axes[i], line, strict=True):
            ax.imshow(picture, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        if rows:
            axes[i, 0].set_ylabel(rows[i], fontsize=8)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=8)
    return figure


def _with_legend(figure: Figure, run: ProbeRun, palette: np.ndarray, most: int = 24) -> Figure:
    names = run.metrics["classes"][:most]
    handles = [Patch(facecolor=palette[k] / 255, edgecolor="#333333", lw=0.3, label=n) for k, n in enumerate(names)]
    figure.legend(handles=handles, loc="outside lower center", ncols=7, fontsize=7)
    return figure
