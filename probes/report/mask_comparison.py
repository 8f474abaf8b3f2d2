"""Compare bidirectional with causal attention on the same images: differences, intervals and permutation tests.

Under the null hypothesis the two runs are exchangeable per image. The test therefore swaps their counts on a random
half of the images, the same images at all sites. If images have groups (cities), resampling and swaps use groups.

Source: Sec. 5.2, Fig. 8; the paper reports peaks without intervals.

Shapes: P permutations plus the observed data in row 0, S sites.
"""

import torch
from matplotlib.lines import Line2D
from torch import Tensor

from llava_bidir.common.bootstrap import RESAMPLINGS, p_values, random_swaps
from probes.analyses.style import (
    FigureData,
    Figures,
    ReportFigure,
    has_depth,
    label_sites,
    mask_colour,
    new_axes,
    site_depth,
)
from probes.models.sites import ADAPTER, ENCODER, is_layer
from probes.runs.formatting import Entry, Rows, bounds, format_interval, format_p, format_points
from probes.runs.probe_run import ProbeRun
from probes.runs.study import StudyRuns
from probes.score.resampling import swapped_scores

from .verdicts import ALPHA

EFFECT_NAMES = {"adapter_drop": "drop-off", "recovery": "recovery"}


def compare_masks(study: StudyRuns, permutations: int = RESAMPLINGS) -> Entry | None:
    """Return the entry "paired" of results.json; None unless the trained model was probed under both masks.

    "sites" has, per site of both runs, the difference of mIoU, its 95% interval and two-sided p-values: uncorrected,
    and corrected for the number of sites. "effects" are drop-off and recovery. Their values and intervals are those of
    the claims, with each run's best layer by cross-validation; the test takes the maximum in every permutation.
    """
    if study.pair() is None:
        return None
    causal, bidirectional = study.pair()
    # Layers of the encoder come before all that the mask changes. Parts would be further tests, and the
    # correction for the number of sites harder on the layers.
    sites = [site for site in causal.sites if has_depth(site) and site in bidirectional.sites]
    groups = causal.groups
    of_causal = causal.site_scores()
    of_bidirectional = bidirectional.site_scores()
    differences = {site: of_bidirectional[site] - of_causal[site] for site in sites}
    images = causal.metrics["images"]
    swaps = random_swaps(images, permutations, causal.metrics["seed"], groups)
    swapped = _swap_images(causal, bidirectional, sites, swaps)
    uncorrected, corrected = p_values(swapped[1] - swapped[0])
    units = images if groups is None else len(torch.unique(groups))
    return {
        "difference": "bidirectional - causal",
        "images": images,
        "groups": None if groups is None else units,
        "permutations": permutations,
        "smallest_p": max(1 / (1 + permutations), 2.0 ** (1 - units)),
        "sites": [
            {
                "site": site,
                "difference": differences[site].value,
                "ci95": differences[site].ci95,
                "p": p.item(),
                "p_corrected": q.item(),
            }
            for site, p, q in zip(sites, uncorrected, corrected, strict=True)
        ],
        "effects": _compare_effects(causal, bidirectional, sites, swapped),
    }


def _swap_images(
    causal: ProbeRun,
    bidirectional: ProbeRun,
    sites: list[str],
    swaps: Tensor,
) -> list[Tensor]:
    """Return mIoU f64[1 + R, S] of both runs after they exchange some of their images, f[1 + R, N]."""
    parts = []
    for part in causal.parts_of_sites(sites):
        sums = [run.sums_at(part) for run in (causal, bidirectional)]
        parts.append([x["miou"] for x in swapped_scores(causal.task, *sums, swaps)])
    return [torch.cat(of_run, 1) for of_run in zip(*parts, strict=True)]


def _compare_effects(
    causal: ProbeRun,
    bidirectional: ProbeRun,
    sites: list[str],
    swapped: list[Tensor],
) -> list[Entry]:
    """Return the differences of drop-off and recovery, with intervals and p-values."""
    layers = [i for i, site in enumerate(sites) if is_layer(site)]
    effect_of_miou = {
        "adapter_drop": lambda miou: miou[:, sites.index(ENCODER)] - miou[:, sites.index(ADAPTER)],
        "recovery": lambda miou: miou[:, layers].amax(1) - miou[:, sites.index(ADAPTER)],
    }
    entries = []
    for name, effect in effect_of_miou.items():
        if name not in causal.effects or name not in bidirectional.effects:
            continue
        difference = bidirectional.effects[name] - causal.effects[name]
        permuted = effect(swapped[1]) - effect(swapped[0])
        p = p_values(permuted[:, None])[0].item()
        entries.append(
            {
                "effect": name,
                "difference": difference.value,
                "ci95": difference.ci95,
                "p": p,
            }
        )
    return entries


def summarize_mask_comparison(comparison: Entry) -> list[str]:
    """Return how many sites differ between the masks, the differences of the effects, and the power of the test."""
    sites = comparison["sites"]
    units = f"{comparison['images']} images"
    if comparison["groups"]:
        units = f"{comparison['groups']} groups of images ({comparison['images']} images)"
    significant = [entry["difference"] for entry in sites if entry["p_corrected"] < ALPHA]
    better = sum(difference > 0 for difference in significant)
    worse = sum(difference < 0 for difference in significant)
    lines = [
        f"Bidirectional attention is significantly better at {better} and worse at {worse} of {len(sites)} sites "
        f"(corrected p < {ALPHA}; {comparison['permutations']} permutations of {units}).",
        "This compares one model per mask. What another training run would change is not in these intervals.",
    ]
    lines += [
        f"The {EFFECT_NAMES[entry['effect']]} differs by {format_points(entry['difference'])} pp, 95% interval "
        f"{format_interval(entry['ci95'])} (p = {format_p(entry['p'])})."
        for entry in comparison["effects"]
    ]
    if comparison["smallest_p"] > ALPHA:
        lines.append(
            f"With so few groups no p-value can be smaller than {format_p(comparison['smallest_p'])}: the test cannot "
            "reject any null hypothesis, and the intervals are unreliable."
        )
    return lines


def mask_comparison_rows(comparison: Entry) -> Rows:
    """Return bidirectional minus causal per site, then for drop-off and recovery."""
    return [
        {"of": entry.get("site") or entry["effect"], "difference": entry["difference"]}
        | bounds(entry["ci95"])
        | {"p": entry["p"], "p_corrected": entry.get("p_corrected")}
        for entry in [*comparison["sites"], *comparison["effects"]]
    ]


def mask_difference(comparison: Entry) -> FigureData:
    """Draw the differences of mIoU with 95% intervals; markers are filled if the corrected p-value is below 5%."""
    figure, ax = new_axes(6.4, 3.3)
    sites = comparison["sites"]
    colour = mask_colour("bidirectional")
    for entry in sites:
        x = site_depth(entry["site"])
        y = 100 * entry["difference"]
        ax.vlines(x, *(100 * bound for bound in entry["ci95"]), color=colour, lw=1.4)
        face = colour if entry["p_corrected"] < ALPHA else "white"
        ax.plot(
            x,
            y,
            "o",
            ms=6,
            mfc=face,
            mec=colour,
        )
    ax.axhline(0, color="black", lw=0.8)
    label_sites(ax, [entry["site"] for entry in sites])
    ax.set_ylabel("bidirectional − causal (pp)")
    marker = {
        "marker": "o",
        "ls": "",
        "markeredgecolor": colour,
    }
    faces = {f"corrected p < {ALPHA}": colour, "not significant": "white"}
    handles = [
        Line2D(
            [],
            [],
            **marker,
            mfc=face,
            label=label,
        )
        for label, face in faces.items()
    ]
    ax.legend(handles=handles, fontsize=8)
    return FigureData(figure, [])


def mask_figures(comparison: Entry | None) -> Figures:
    """Yield the figure of both masks, if the study has both."""
    if comparison:
        yield ReportFigure(
            "paired_sites", "Difference by site",
            "mIoU under bidirectional minus causal attention on the same images (Fig. 8). Look for layers whose "
            "interval excludes zero. Lines: paired 95% intervals. Filled: significant in a permutation test, corrected "
            f"for {len(comparison['sites'])} sites.",
            mask_difference(comparison))  # fmt: skip
