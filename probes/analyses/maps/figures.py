"""Figures of predicted maps (Figs. 4, 6, 12, 13)."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from probes.analyses.style import FigureData
from probes.models.sites import ADAPTER, ENCODER
from probes.runs.finished_run import FinishedRun
from probes.runs.probe_run import ProbeRun
from probes.runs.run_files import read_tensors
from probes.tasks import SEGMENTATION
from probes.tasks.segmentation import colorize_classes

LEGEND_CLASSES = 24
SHOWN_LAYERS = 6  # of a bare encoder


def site_maps(run: FinishedRun, palette: np.ndarray | None = None) -> FigureData:
    """Draw images, targets, and the predictions from encoder to the best layer (Figs. 4, 13).

    Target and predictions of an image share their colours; `palette` uint8[K, 3] has those of classes.
    """
    index = run.analysis("maps.json")
    maps = read_tensors(run.path / "maps.safetensors")
    dataset = run.dataset()
    sites = _shown_sites(run)
    rows = []
    for image in index["images"]:
        sample = dataset[image["index"]]
        predicted = maps[f"image/{image['index']}"].numpy()
        target = torch.from_numpy(sample["target"])[None]
        maps_shown = [run.task.truth(target)[0].numpy()]
        maps_shown += [predicted[index["sites"].index(site)] for site in sites]
        coloured = run.task.colorize(np.stack(maps_shown), palette)
        rows.append([np.asarray(sample["image"]), *coloured])
    titles = ["image", "target", *(site.replace("_", " ") for site in sites)]
    legend = _legend(run, palette) if run.task_name == SEGMENTATION else ()
    return FigureData(_image_grid(rows, titles, legend=legend), [])


def _shown_sites(run: FinishedRun) -> list[str]:
    """Return encoder, adapter, the first, the half-way and the best layer, where probed; of an encoder, some layers."""
    layers = [site for site in run.layers if site != ADAPTER]
    peak = run.peak_layer
    if not layers and not run.has_llm:  # the final norm alone
        return run.sites
    if not run.has_llm:
        count = min(SHOWN_LAYERS, len(layers))
        evenly = np.linspace(0, len(layers) - 1, count).round().astype(int)
        shown = {*evenly.tolist(), layers.index(peak)}
        return [layers[i] for i in sorted(shown)]
    shown = [ENCODER, ADAPTER]
    if layers:
        half_way = layers[layers.index(peak) // 2]
        shown += [layers[0], half_way, peak]
    return [site for site in dict.fromkeys(shown) if site in run.sites]


def knockout_maps(run: ProbeRun, name: str, palette: np.ndarray) -> FigureData:
    """Draw one image by layer: no blocking, wrong class blocked, correct class blocked (Figs. 6, 12)."""
    index = run.analysis("maps.json")
    maps = read_tensors(run.path / "maps.safetensors")
    (case,) = [case for case in index["knockout"] if case["class"] == name]
    sample = run.dataset()[case["image"]]
    predicted = maps[f"knockout/{name}"].numpy()
    evenly = np.linspace(0, predicted.shape[1] - 1, 7)
    layers = np.unique(evenly.round().astype(int))
    blank = np.full((*sample["target"].shape, 3), 255)
    target = colorize_classes(sample["target"], palette)
    first_column = [np.asarray(sample["image"]), target, blank]
    rows = []
    for first, of_condition in zip(first_column, predicted, strict=True):
        maps_shown = [colorize_classes(of_condition[layer], palette) for layer in layers]
        rows.append([first, *maps_shown])
    titles = ["image / label"]
    titles += ["adapter" if layer == 0 else f"layer {layer}" for layer in layers]
    row_titles = ["no\nblocking", f"{name}\nblocked", f"{case['correct_class']}\nblocked"]
    return FigureData(_image_grid(rows, titles, row_titles, _legend(run, palette)), [])


def _legend(run: ProbeRun, palette: np.ndarray) -> list[Patch]:
    """Return the colours of the first classes."""
    names = run.metrics["classes"][:LEGEND_CLASSES]
    return [
        Patch(
            facecolor=palette[k] / 255,
            edgecolor="#333333",
            lw=0.3,
            label=n,
        )
        for k, n in enumerate(names)
    ]


def _image_grid(
    rows: list[list[np.ndarray]],
    titles: list[str],
    row_titles: Sequence[str] = (),
    legend: Sequence[Patch] = (),
) -> Figure:
    width = 1.25 * len(titles) + 0.4
    height = 1.3 * len(rows) + 0.7
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for i, row in enumerate(rows):
        for ax, image in zip(axes[i], row, strict=True):
            ax.imshow(image, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
    for ax, title in zip(axes[:, 0], row_titles, strict=False):
        ax.set_ylabel(title, fontsize=8)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=8)
    if legend:
        figure.legend(
            handles=legend,
            loc="outside lower center",
            ncols=7,
            fontsize=7,
        )
    return figure
