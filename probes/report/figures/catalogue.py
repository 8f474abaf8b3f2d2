"""The figures of a page: which of them the runs have the results for, and what to look for in each."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from probes.analyses.knockout.effects import read_cases
from probes.data.palette import palette_of
from probes.report import tables
from probes.report.claims import confused_patches
from probes.report.study import Study

from . import knockout, layer_curves, maps, starvation
from .knockout_entries import causal_pictures
from .probe_entries import budget_pictures, confusion_pictures, paired_pictures, recipe_pictures, state_pictures
from .style import ReportFigure


def pictures_of(study: Study, facts: dict[str, Any]) -> Iterator[ReportFigure]:
    """All figures of one model on one dataset.

    Args:
        study: Its runs.
        facts: What results.json says of it.
    """
    run = study.first
    palette = palette_of(run.dataset())
    yield ReportFigure(
        "layers",
        "Drop-off and recovery",
        "From drop-off to recovery",
        "Segmentation quality at every stage, as a linear probe reads it (Figs. 3 and 8). Look for the fall from "
        "encoder to adapter and the climb behind it; the dashed line marks the best layer and what it gains over the "
        "adapter. Dotted: the same model before training. Bands: 95% intervals.",
        layer_curves.layer_curves(study),
    )
    yield from paired_pictures(facts["paired"])
    yield from _starvation_pictures(facts["starvation"])
    yield from _knockout_pictures(study)
    yield from causal_pictures(study)
    yield from confusion_pictures(study, facts["confusion"])
    yield from _map_pictures(study, palette)
    yield from _umap_pictures(study, palette)
    yield from recipe_pictures(study, facts["scale"])
    yield from state_pictures(study)
    yield from budget_pictures(study)


def _starvation_pictures(facts: dict[str, Any] | None) -> Iterator[ReportFigure]:
    if facts is None:
        return
    yield ReportFigure(
        "starvation",
        "Context starvation",
        "The gap by patch",
        "How much more accurate bidirectional attention is under each patch, in raster order "
        f"(Fig. 7, at {facts['site']}). Look for the gap at the first patches, which see few or no others "
        "under causal attention, and for its decay. Lines: 95% intervals.",
        starvation.starvation_curve(facts),
    )
    yield ReportFigure(
        "starvation_grid",
        "Context starvation",
        "Where it starves",
        "The same gap where it lies in the image; it should fade from the top left on.",
        starvation.starvation_grid(facts),
        "half",
    )


def _knockout_pictures(study: Study) -> Iterator[ReportFigure]:
    section, selection = "Attention knockout", tables.selection_rows(study)
    for mask, run in study.trained.items():
        least = confused_patches(run)
        if read_cases(run, least) is None:
            continue
        yield ReportFigure(
            f"knockout_{mask}",
            section,
            f"Wrong patches left, {mask}",
            f"Of images with {least} or more patches wrong at the adapter, the share still wrong at each layer "
            "(Fig. 11). The paper expects red, the wrong class hidden from all patches, below grey, and blue, the "
            "right class hidden, above it. Dotted: as many random patches hidden. Bands: 95% intervals.",
            knockout.knockout_curves(run, least),
            "half",
        )
    for mask, run in study.trained.items():
        if selection and read_cases(run, 1) is not None:
            yield ReportFigure(
                f"knockout_selection_{mask}",
                section,
                f"Which images count, {mask}",
                "The same two effects, in the later half of the layers, by how many patches an image must have wrong. "
                "On the left single patches on a boundary dominate, on the right whole regions taken for another "
                "class. Dashed: where the claims are read.",
                knockout.knockout_selection(selection, mask, confused_patches(run)),
                "half",
            )
    for mask, run in study.trained.items():
        if read_cases(run, confused_patches(run)) is not None:
            yield ReportFigure(
                f"knockout_classes_{mask}",
                section,
                f"Class by class, {mask}",
                "The same curves by the class that the patches are wrongly called.",
                knockout.knockout_by_class(run, confused_patches(run)),
                "wide",
            )


def _map_pictures(study: Study, palette: np.ndarray) -> Iterator[ReportFigure]:
    for mask, run in study.trained.items():
        facts = run.analysis("maps.json")
        if not facts:
            continue
        yield ReportFigure(
            f"maps_{mask}",
            "What the probes see",
            f"What the probes see, {mask}",
            "Predictions from the encoder to the best layer (Figs. 4 and 13), the first images of the split. Look for "
            "confusions that the adapter adds and the layers resolve.",
            maps.site_maps(run, palette),
            "wide",
        )
        for case in facts["knockout"]:
            yield ReportFigure(
                f"knockout_maps_{mask}_{case['class'].replace(' ', '_')}",
                "What the probes see",
                f"{case['class']} for {case['correct_class']}, {mask}",
                f"The image with the most patches wrongly called {case['class']!r} beside some rightly called "
                f"{case['correct_class']!r}, layer by layer (Figs. 6 and 12): "
                "as it is, with the wrong class hidden, with the right one hidden.",
                maps.knockout_maps(run, case["class"], palette),
                "wide",
            )


def _umap_pictures(study: Study, palette: np.ndarray) -> Iterator[ReportFigure]:
    for mask, run in study.trained.items():
        facts = run.analysis("umap.json")
        for image in facts["images"] if facts else ():
            yield ReportFigure(
                f"umap_{mask}_{image['image']}",
                "Patches in two dimensions",
                f"Patches of image {image['name']}, {mask}",
                "UMAP of the patches of one image, coloured by class (Fig. 5). It pulls clusters apart until they look "
                "clear, so trust the numbers above: the share of a patch's ten nearest neighbours, in the original "
                "space, that have its class.",
                maps.umap_panels(image, run.metrics["classes"], palette),
            )
