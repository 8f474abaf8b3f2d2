"""Pictures of what the probes see, and of the states in two dimensions (Figs. 4 to 6, 12, 13)."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from probes.data.palette import colorize
from probes.evaluation.metrics import peak_layer
from probes.models.frozen_mllm import ADAPTER, ENCODER
from probes.report.study import optional_tensors
from probes.results.probe_run import ProbeRun

from .style import FigureData, new_axes


def umap_panels(facts: dict[str, Any], classes: list[str], palette: np.ndarray) -> FigureData:
    """The patches of one image in two dimensions, by site; classes beyond the four commonest in grey (Fig. 5)."""
    figure, axes = new_axes(6.6, 2.9, len(facts["sites"]), squeeze=False)
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
        purity = "unknown" if entry["knn_purity"] is None else f"{entry['knn_purity']:.0%}"
        ax.set_title(f"{entry['site']}\nneighbours of the same class {purity}", fontsize=8)
        rows += [
            {"site": entry["site"], "patch": i, "label": int(labels[i]), "x": x, "y": y}
            for i, (x, y) in enumerate(entry["xy"])
        ]
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    return FigureData(figure, rows)


def site_maps(run: ProbeRun, palette: np.ndarray) -> FigureData:
    """Image, truth, and the probes' predictions from encoder to the best layer (Figs. 4, 13)."""
    facts, maps = run.analysis("maps.json"), optional_tensors(run, "maps.safetensors")
    dataset = run.dataset()
    peak = peak_layer({entry["site"]: entry["miou"] for entry in run.metrics["sites"]})
    layers = [site for site in run.layers if site != ADAPTER]
    between = [layers[0], layers[layers.index(peak) // 2], peak] if layers else []
    sites = [site for site in dict.fromkeys([ENCODER, ADAPTER, *between]) if site in run.sites]
    pictures = []
    for image in facts["images"]:
        sample, predicted = dataset[image["index"]], maps[f"image/{image['index']}"].numpy()
        pictures.append(
            [np.asarray(sample["image"]), colorize(sample["target"], palette)]
            + [colorize(predicted[facts["sites"].index(site)], palette) for site in sites]
        )
    figure = _picture_grid(pictures, ["image", "truth", *(site.replace("_", " ") for site in sites)])
    return FigureData(_with_legend(figure, run, palette), [])


def knockout_maps(run: ProbeRun, name: str, palette: np.ndarray) -> FigureData:
    """One image layer by layer: nothing hidden, the wrong class hidden, the right class hidden (Figs. 6, 12)."""
    facts, maps = run.analysis("maps.json"), optional_tensors(run, "maps.safetensors")
    (case,) = [case for case in facts["knockout"] if case["class"] == name]
    sample, predicted = run.dataset()[case["image"]], maps[f"knockout/{name}"].numpy()
    shown = np.unique(np.linspace(0, predicted.shape[1] - 1, 7).round().astype(int))
    left = [
        np.asarray(sample["image"]),
        colorize(sample["target"], palette),
        np.full((*sample["target"].shape, 3), 255),
    ]
    pictures = [[left[i], *(colorize(predicted[i, layer], palette) for layer in shown)] for i in range(3)]
    titles = ["image / truth", *("adapter" if layer == 0 else f"layer {layer}" for layer in shown)]
    rows = ["nothing\nhidden", f"{name}\nhidden", f"{case['correct_class']}\nhidden"]
    return FigureData(_with_legend(_picture_grid(pictures, titles, rows), run, palette), [])


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
