"""What the report shows of predicted maps."""

import numpy as np
import torch

from probes.analyses.analysis import Section
from probes.analyses.charts import Figure, PictureRow
from probes.data.image_dataset import palette_of
from probes.models.sites import ADAPTER, ENCODER
from probes.ops.geometry import IGNORE_INDEX
from probes.runs.files import read_tensors
from probes.runs.formatting import file_name
from probes.runs.read import ProbeRun
from probes.runs.study import StudyRuns
from probes.tasks import SEGMENTATION
from probes.tasks.segmentation import colorize_classes


def section(study: StudyRuns) -> Section:
    """Return the section of a study: the maps of its runs, which need the dataset."""
    figures: list[Figure] = []
    if not any(run.analysis("maps.json") for run in study.main_runs.values()):
        return Section()
    palette = palette_of(study.first.dataset())
    for mask, run in study.main_runs.items():
        result = run.analysis("maps.json")
        if not result:
            continue
        sites = shown_sites(run)
        title = "Predictions by layer"
        if run.has_llm:
            title += f", {mask}"
        shown = Figure(
            f"maps_{mask}",
            title,
            "Look for the layer from which on objects are found, and for confusions that appear and disappear over the "
            "layers (Figs. 4 and 13).",
            columns=["photo", "truth", *sites],
            pictures=site_rows(run, sites, palette),
        )
        figures.append(shown)
        for case in result["knockout"]:
            wrong, correct = case["class"], case["correct_class"]
            shown = Figure(
                f"knockout_maps_{mask}_{file_name(wrong)}",
                f"{correct} predicted as {wrong}, {mask}",
                f"The image with the most patches wrongly predicted as {wrong!r} that also has patches correctly "
                f"predicted as {correct!r}, by layer (Figs. 6 and 12). Rows: no blocking, wrong class blocked, correct "
                f"class blocked, by the predictions at {case['block_by']}, in layers {case['layers'] or 'all'}.",
                columns=knockout_columns(run, wrong),
                pictures=knockout_rows(run, wrong, palette),
            )
            figures.append(shown)
    return Section(figures)


SHOWN_LAYERS = 6  # of a bare encoder, and of an LLM under knockout


def site_rows(
    run: ProbeRun, sites: list[str], palette: np.ndarray | None = None
) -> list[PictureRow]:
    """Return images, targets, and the predictions at sites (Figs. 4, 13).

    Target and predictions of an image share their colours; `palette` uint8[K, 3] has those of classes.
    """
    index = run.analysis("maps.json")
    maps = read_tensors(run.path / "maps.safetensors")
    dataset = run.dataset()
    rows = []
    for image in index["images"]:
        sample = dataset[image["index"]]
        predicted = maps[f"image/{image['index']}"].numpy()
        target = torch.from_numpy(sample["target"])[None]
        shown = [run.task.truth(target)[0].numpy()]
        shown += [predicted[index["sites"].index(site)] for site in sites]
        truth, *coloured = run.task.colorize(np.stack(shown), palette)
        if run.task.name == SEGMENTATION:
            truth = without_ignored(truth, sample["target"])
        rows.append(PictureRow(image["name"], [np.asarray(sample["image"]), truth, *coloured]))
    return rows


def without_ignored(picture: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return a picture uint8[H, W, 3] of targets as uint8[H, W, 4], transparent where no class is labelled."""
    opacity = np.where(target == IGNORE_INDEX, 0, 255).astype(np.uint8)
    return np.dstack([picture, opacity])


def shown_sites(run: ProbeRun) -> list[str]:
    """Return encoder, adapter, the first, the half-way and the best layer, where probed; of an encoder, some layers."""
    layers = [site for site in run.layers if site != ADAPTER]
    peak = run.peak_layer
    if not layers and not run.has_llm:  # the final norm alone
        return run.sites
    if not run.has_llm:
        evenly = _evenly(len(layers), min(SHOWN_LAYERS, len(layers)))
        shown = {*evenly, layers.index(peak)}
        return [layers[i] for i in sorted(shown)]
    shown = [ENCODER, ADAPTER]
    if layers:
        half_way = layers[layers.index(peak) // 2]
        shown += [layers[0], half_way, peak]
    return [site for site in dict.fromkeys(shown) if site in run.sites]


def shown_layers(run: ProbeRun, name: str) -> list[int]:
    """Return the layers of a map under knockout that are shown."""
    maps = read_tensors(run.path / "maps.safetensors")
    of_condition = maps[f"knockout/{name}"][0]
    return sorted({*_evenly(len(of_condition), SHOWN_LAYERS + 1)})


def _evenly(layers: int, count: int) -> list[int]:
    """Return so many indices of layers at even distances, the first and the last one among them."""
    indices = np.linspace(0, layers - 1, count)
    return indices.round().astype(int).tolist()


def knockout_columns(run: ProbeRun, name: str) -> list[str]:
    """Return the titles of the pictures of :func:`knockout_rows`."""
    layers = [f"layer {layer}" if layer else "adapter" for layer in shown_layers(run, name)]
    return ["photo, truth", *layers]


def knockout_rows(run: ProbeRun, name: str, palette: np.ndarray) -> list[PictureRow]:
    """Return one image by layer: no blocking, wrong class blocked, correct class blocked (Figs. 6, 12)."""
    index = run.analysis("maps.json")
    maps = read_tensors(run.path / "maps.safetensors")
    (case,) = [case for case in index["knockout"] if case["class"] == name]
    sample = run.dataset()[case["image"]]
    predicted = maps[f"knockout/{name}"].numpy()
    truth = colorize_classes(sample["target"], palette)
    first = [np.asarray(sample["image"]), without_ignored(truth, sample["target"]), None]
    titles = ["no blocking", f"{name} blocked", f"{case['correct_class']} blocked"]
    layers = shown_layers(run, name)
    rows = []
    for title, picture, of_condition in zip(titles, first, predicted, strict=True):
        coloured = [colorize_classes(of_condition[layer], palette) for layer in layers]
        rows.append(PictureRow(title, [picture, *coloured]))
    return rows
