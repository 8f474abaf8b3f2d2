"""What the report shows of starvation: the gap between a study's run under the first mask and each other one.

The gap is the other one's accuracy by patch minus the first one's. It cancels effects of content that both share: early
patches are mostly sky and ceiling. One mask may still be better at these classes, so accuracy is also standardised to
the same mix of classes at every patch: that on each class, weighted by the class's share of the split's labelled pixels
(direct standardisation). A class that never occurs at a patch is left out there, for both masks. The class of a patch
is that of most of its labelled pixels.

Shapes: N images, T patches, K classes, R resamplings.
"""

import math
from collections.abc import Iterator
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from probes.analyses.analysis import Section
from probes.analyses.charts import Chart, Curve, Figure, Grid, Point
from probes.analyses.starvation import sink_warning
from probes.runs.compare import check_pair
from probes.runs.formatting import PAPER, Rows, bounds
from probes.runs.read import ProbeRun
from probes.runs.study import PAPER_MASKS, StudyRuns
from probes.score.estimate import Estimate

GAP = "gap"


class Gaps(TypedDict):
    """Accuracies by patch under two masks, under their names, and the gap; NaN without labelled pixels."""

    gap: list[float]
    gap_ci95: list[list[float]]
    first_row: dict[str, float | list[float]]  # the same of the first row's patches together


class Starvation(Gaps):
    """The gaps at the first run's best layer."""

    site: str
    grid: list[int]
    images: int
    untrained: list[str]
    by_class: Gaps  # standardised, of the first 50 patches


def section(study: StudyRuns) -> Section:
    """Return the section of a study; empty without two masks or the best layer under the first one.

    results.json["starvation"] is that of the second mask, with those of further ones in a list, "further".
    """
    results = []
    figures: list[Figure] = []
    sentences: dict[str, None] = {}
    tables = {}
    for pair in study.pairs():
        result = starvation(*pair)
        if result is None:
            continue
        masks = tuple(run.mask for run in pair)
        figures += starvation_figures(result, masks, suffix=f"_{masks[1]}" if results else "")
        results.append(result)
        sentences[sink_warning({run.mask: run for run in pair}, result["site"])] = None
        if masks == PAPER_MASKS:
            tables["table3"] = table3(result)
    first, *further = results or [None]
    if further:
        first = first | {"further": further}
    return Section(
        figures, [*filter(None, sentences)], tables=tables, results={"starvation": first}
    )


def table3(starvation: Starvation) -> Rows:
    """Return Table 3 (accuracy at the first three patches): rows of the runs, then of the paper."""
    of_run = []
    of_paper = []
    for patch in range(3):
        row: dict[str, Any] = {"model": "this run", "patch": patch}
        for kind in (*PAPER_MASKS, GAP):
            value = starvation[kind][patch]
            row[kind] = None if math.isnan(value) else value  # no pixel of the patch is labelled
        of_run.append(row)
        published = PAPER["table3_patch_accuracy"][f"patch_{patch}"]
        row = {"model": "paper, clip, ADE20K", "patch": patch}
        of_paper.append(row | dict(zip((*PAPER_MASKS, GAP), published, strict=False)))
    return of_run + of_paper


def gap_chart(result: Gaps, columns: int, title: str) -> Chart:
    """Return the differences of the first row, with intervals."""
    gaps = zip(result["gap"][:columns], result["gap_ci95"], strict=False)
    points = [Point(i + 1, gap, *ci95) for i, (gap, ci95) in enumerate(gaps)]
    ticks = {i + 1: str(i + 1) for i in range(columns)}
    return Chart(
        [Curve(points=points, name="", colour=0, style="dots", mark="circle")],
        ticks,
        title,
        "points, by patch from the left",
        signed=True,
    )


def accuracy_grids(result: Starvation, masks: tuple[str, str]) -> list[Grid]:
    """Return accuracy by patch under both masks with one range of colours, and their difference."""
    shown = {}
    for name in (*masks, GAP):
        shown[name] = np.array(result[name], float).reshape(result["grid"])
    both = [shown[mask] for mask in masks]
    span = (float(np.nanmin(both)), float(np.nanmax(both)))
    grids = []
    for name, values in shown.items():
        first_patch = 100 * values[0, 0]
        first_row = 100 * np.nanmean(values[0])
        if name == GAP:
            unit = f"first patch {first_patch:+.1f}, first row {first_row:+.1f}"
            title = f"{masks[1]} − {masks[0]}"
            grid = Grid(values=values, title=title, unit=unit.replace("-", "−"), signed=True)
        else:
            unit = f"first patch {first_patch:.1f}%, first row {first_row:.1f}%"
            grid = Grid(values=values, title=name, unit=unit.replace("-", "−"), span=span)
        grids.append(grid)
    return grids


def starvation_figures(
    result: Starvation, masks: tuple[str, str], suffix: str = ""
) -> Iterator[Figure]:
    """Yield the figures of context starvation between two masks; names of their files end with `suffix`."""
    columns = result["grid"][1]
    standardised = result["by_class"]
    at = f"at {result['site'].replace('_', ' ')}"
    yield Figure(
        name=f"starvation{suffix}",
        title=f"Accuracy by patch {at}",
        caption="Under causal attention the first image tokens see few others (Fig. 7). Look for a gap at the first "
        f"ones. The darker, the higher; of differences, blue is higher under {masks[1]} attention. Lines: 95% "
        "intervals.",
        panels=[*accuracy_grids(result, masks), gap_chart(result, columns, "first row")],
        rows=gap_rows(result, masks),
    )
    gaps = zip(result["gap"], standardised["gap"], strict=False)
    yield Figure(
        name=f"starvation_by_class{suffix}",
        title="Accuracy gap with equal class frequencies",
        caption=f"The gap of the first row {at} as measured, and reweighted so that every patch has the class "
        "frequencies of the full split. Early patches often show only a few classes.",
        panels=[
            gap_chart(result, columns, "as measured"),
            gap_chart(standardised, columns, "same class frequencies"),
        ],
        rows=[
            {"patch": i, "gap": gap, "standardised": gap_by_class}
            for i, (gap, gap_by_class) in enumerate(gaps)
        ],
    )


def gap_rows(result: Starvation, masks: tuple[str, str]) -> Rows:
    """Return the rows of the CSV file: a row per patch."""
    return [
        {"patch": i} | {name: result[name][i] for name in (*masks, GAP)} | bounds(ci95, "gap_")
        for i, ci95 in enumerate(result["gap_ci95"])
    ]


FIRST_PATCHES = 50  # as in Fig. 7; standardisation takes K products of R x N and N x T


def starvation(first: ProbeRun, second: ProbeRun) -> Starvation | None:
    """Return the gap at the first run's best layer; None if it has no layers, or the second run lacks this one.

    Raises:
        UserError: The runs differ in images, control or how probes were made.
    """
    check_pair(first, second)
    site = first.peak_layer
    if site is None or site not in second.sites:
        return None
    counts = first.counts  # each run's file is read once
    right = {
        first.mask: counts.patch_right[first.sites.index(site)],
        second.mask: second.counts.patch_right[second.sites.index(site)],
    }
    once = torch.ones_like(first.weights[:1])
    weights = torch.cat([once, first.weights]).double()
    columns = first.metrics["grid"][1]
    pixels = weights @ with_first_row(counts.patch_valid, columns)
    accuracy = {}
    for mask, right_pixels in right.items():
        accuracy[mask] = weights @ with_first_row(right_pixels, columns) / pixels
    share = counts.labelled.sum(0).double()
    standardised = standardised_accuracy(
        right,
        valid=counts.patch_valid,
        labels=first.patch_classes,
        share=share / share.sum(),
        weights=weights,
        columns=columns,
    )
    return {
        "site": site,
        **{key: first.metrics[key] for key in ("grid", "images", "untrained")},
        **gaps(accuracy),
        "by_class": gaps(standardised),
    }


def with_first_row(counts: Tensor, columns: int, patches: int | None = None) -> Tensor:
    """Return the first counts by patch f[N, T], and the sum over those of the first row as the last one, f64."""
    first_row = counts[:, :columns].sum(1, keepdim=True)
    return torch.cat([counts[:, :patches], first_row], 1).double()


def standardised_accuracy(
    right: dict[str, Tensor],
    valid: Tensor,
    labels: Tensor,
    share: Tensor,
    weights: Tensor,
    columns: int,
) -> dict[str, Tensor]:
    """Return the accuracy by mask at the first patches, and of the first row, f64[1 + R, FIRST_PATCHES + 1].

    Args:
        right: Correctly predicted pixels by image and patch, f[N, T], by mask.
        valid: Labelled pixels, f[N, T].
        labels: Class of each patch, long[N, T], -1 if unlabelled.
        share: f64[K], the mix of classes that every patch is given.
        weights: f64[1 + R, N], of the images and of their resamplings.
        columns: Patches of a row.
    """
    total = dict.fromkeys(right, 0.0)
    mix = 0.0
    for k in share.nonzero().flatten().tolist():
        of_class = labels == k
        pixels = weights @ with_first_row(valid * of_class, columns, FIRST_PATCHES)
        mix += share[k] * (pixels > 0)
        for mask, right_pixels in right.items():
            correct = weights @ with_first_row(right_pixels * of_class, columns, FIRST_PATCHES)
            accuracy = torch.where(pixels > 0, correct / pixels, 0.0)
            total[mask] = total[mask] + share[k] * accuracy
    return {mask: values / mix for mask, values in total.items()}


def gaps(accuracy: dict[str, Tensor]) -> Gaps:
    """Return both accuracies and the gap by patch, and of the last column as "first_row", from f64[1 + R, T + 1]."""
    of_first, of_second = accuracy.values()
    gap = of_second - of_first
    columns = {mask: values[0].tolist() for mask, values in accuracy.items()}
    columns["gap"] = gap[0].tolist()
    columns["gap_ci95"] = [Estimate.from_vector(values).ci95 for values in gap.T]
    *_, last = zip(*columns.values(), strict=True)
    first_row = dict(zip(columns, last, strict=True))
    return {key: values[:-1] for key, values in columns.items()} | {"first_row": first_row}
