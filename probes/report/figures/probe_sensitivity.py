"""Figures of probe variants: norms, learning rates, heads, seeds, shuffled labels."""

from typing import Any

from probes.report.probe_sensitivity import EFFECTS, VariantScores, one_per_value, read_variants, select_variants
from probes.report.study import Study
from probes.report.summary_text import SCALE_SECTION, SEEDS_SECTION
from probes.report.tables import bounds
from probes.results.probe_run import ProbeRun

from .layer_curves import depth_and_miou, draw_ci95, sites_by_depth
from .style import (
    COLOURS,
    FigureData,
    Figures,
    ReportFigure,
    caption,
    label_sites,
    mask_colour,
    mask_panels,
    new_axes,
    score_row,
)

DASHES = ("-", "--", ":", "-.")
VariantsByMask = dict[str, tuple[ProbeRun, list[VariantScores]]]


def variant_curves(variants_by_mask: VariantsByMask, *keys: str) -> FigureData:
    """Draw mIoU by site for several probe variants, one panel per mask.

    They differ in the settings `keys`: the first sets the colour, the others the dash.
    """
    figure, axes = mask_panels(variants_by_mask, height=3.4)
    rows = []
    for ax, (mask, (run, variants)) in zip(axes, variants_by_mask.items(), strict=True):
        values = [tuple(variant.settings[key] for key in keys) for variant in variants]
        colours, dashes = (list(dict.fromkeys(part)) for part in ([v[0] for v in values], [v[1:] for v in values]))
        for variant, value in zip(variants, values, strict=True):
            colour = COLOURS[colours.index(value[0]) % len(COLOURS)]
            dash, width = DASHES[dashes.index(value[1:]) % len(DASHES)], 2.4 if variant.name is None else 1.3
            ax.plot(*depth_and_miou(variant.entries), dash, color=colour, lw=width, label=variant.label(*keys))
            rows += [
                {"image_attention": mask, "recipe": variant.name or "main"} | variant.settings | score_row(entry)
                for entry in variant.entries
            ]
        label_sites(ax, sites_by_depth(run), 8, fontsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return FigureData(figure, rows)


def effects_by_variant(scale: dict[str, dict[str, Any]]) -> FigureData:
    """Draw the results of `scale_sensitivity` by mask: both effects with intervals under each norm and rate."""
    names = list(dict.fromkeys(_variant_name(entry) for result in scale.values() for entry in result["recipes"]))
    figure, axes = new_axes(6.6, 0.34 * len(names) * len(scale) + 1.2, 2, sharey=True)
    rows = []
    for ax, (effect, text) in zip(axes, EFFECTS.items(), strict=True):
        for i, (mask, result) in enumerate(scale.items()):
            for entry in result["recipes"]:
                if effect not in entry:
                    continue
                estimate, colour = entry[effect], mask_colour(mask)
                y = -names.index(_variant_name(entry)) - 0.22 * (i - (len(scale) - 1) / 2)
                ax.hlines(y, *(100 * bound for bound in estimate["ci95"]), color=colour, lw=1.5)
                ax.plot(100 * estimate["value"], y, "o", ms=5, markeredgecolor=colour,
                        markerfacecolor=colour if estimate["holds"] else "white")  # fmt: skip
                keys = ("recipe", "feature_norm", "learning_rate", "peak_site")
                row = {"image_attention": mask} | {key: entry[key] for key in keys} | {"effect": effect}
                row |= {"value": estimate["value"], **bounds(estimate["ci95"]), "holds": estimate["holds"]}
                rows.append(row)
        ax.axvline(0, color="black", lw=0.8)
        ax.set_xlabel(f"{text} (pp)")
    axes[0].set_yticks([-i for i in range(len(names))], names, fontsize=8)
    for mask in scale:
        axes[0].plot([], [], "o-", color=mask_colour(mask), label=mask)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return FigureData(figure, rows)


def _variant_name(entry: dict[str, Any]) -> str:
    return f"norm {entry['feature_norm']}, lr {entry['learning_rate']}"


def control_curves(study: Study, shuffled: dict[str, list[VariantScores]]) -> FigureData:
    """Draw the trained curves with their controls: shuffled labels, untrained model, most common class."""
    figure, ax = new_axes(6.4, 3.6)
    rows = []
    for mask, run in study.trained.items():
        kinds = [("trained", "-", run.metrics["sites"])]
        if control := study.control(mask):
            kinds.append(("untrained model", "--", control.metrics["sites"]))
        kinds += [("shuffled labels", ":", variant.entries) for variant in shuffled.get(mask, [])]
        for kind, dash, entries in kinds:
            ax.plot(*depth_and_miou(entries), dash, color=mask_colour(mask), lw=1.8, label=f"{mask}, {kind}")
            rows += [{"image_attention": mask, "control": kind} | score_row(entry) for entry in entries]
    baseline = study.first.metrics["baseline"]["miou"]
    ax.axhline(100 * baseline, color="#444444", lw=0.9, ls="-.", label="most common class everywhere")
    label_sites(ax, sites_by_depth(*study.runs))
    ax.set_ylabel("mIoU (%)")
    ax.set_ylim(bottom=0)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return FigureData(figure, rows)


def seed_curves(variants_by_mask: VariantsByMask) -> FigureData:
    """Draw the curve of every probe seed, and the main seed's interval over images."""
    figure, axes = mask_panels(variants_by_mask, height=3.2)
    rows = []
    for ax, (mask, (run, variants)) in zip(axes, variants_by_mask.items(), strict=True):
        draw_ci95(ax, run, mask_colour(mask), alpha=0.15, label="95% interval over images")
        for variant in variants:
            ax.plot(*depth_and_miou(variant.entries), color=mask_colour(mask), lw=1, alpha=0.8,
                    label="probe seeds" if variant is variants[0] else None)  # fmt: skip
            common = {"image_attention": mask, "seed": variant.settings["seed"]}
            rows += [common | score_row(entry) for entry in variant.entries]
        label_sites(ax, sites_by_depth(run), 8, fontsize=8)
        ax.legend(fontsize=8)
    return FigureData(figure, rows)


def variant_figures(study: Study, scale: dict[str, dict[str, Any]]) -> Figures:
    """Yield the figures of norms and learning rates, heads, seeds and controls.

    Solved probes depend neither on learning rate nor on seed: with them, the path is shown instead.
    """
    runs, keys = study.runs_with_variants, ("feature_norm", "learning_rate")
    if scale and not study.solved:
        curves = {mask: (runs[mask], select_variants(runs[mask], *keys)) for mask in scale}
        yield ReportFigure(
            "scale_effects", SCALE_SECTION, "Drop-off and recovery by norm and learning rate",
            "The two effects by how the probe was trained. Check whether all intervals are on the same side of zero. "
            "Filled: the 95% interval is above zero.",
            effects_by_variant(scale))  # fmt: skip
        yield ReportFigure(
            "scale_curves", SCALE_SECTION, "Curves by norm and learning rate",
            "mIoU by site per probe variant; thick: the main one. Curves that differ in shape, not only in height, "
            "show a dependence on the scale of the features.",
            variant_curves(curves, *keys))  # fmt: skip
    with_labels = lambda run, labels: [v for v in read_variants(run) if v.settings["labels"] == labels]
    heads = {mask: (run, v) for mask, run in runs.items() if (v := one_per_value(with_labels(run, "true"), "head"))}
    if heads:
        yield ReportFigure(
            "heads", "Probe heads", "Linear and nonlinear heads",
            "The same states read by other probe heads, as the paper's limitations suggest. If a nonlinear head closes "
            "the drop-off, the information is present but not linearly readable; otherwise it is lost.",
            variant_curves(heads, "head"))  # fmt: skip
    seeds = {mask: (run, v) for mask, run in runs.items() if (v := one_per_value(select_variants(run, "seed"), "seed"))}
    if seeds and not study.solved:
        yield ReportFigure(
            "seeds", SEEDS_SECTION, "Probes from several seeds",
            "One line per probe seed, and the main seed's interval over images, which does not include the randomness "
            "of probe training. Lines within the band add little to it.",
            seed_curves(seeds))  # fmt: skip
    shuffled = {mask: with_labels(run, "shuffled") for mask, run in runs.items()}
    if any(shuffled.values()):
        yield ReportFigure(
            "controls", "Controls", "Scores without training",
            caption(
                "Dotted: probes trained on shuffled labels, the score that the probe alone can reach.",
                "Dashed: the untrained model, the score from the architecture alone."
                * any(study.control(mask) for mask in study.trained),
                "Dash-dotted: the most common class everywhere. The rest of the trained curve comes from training.",
            ),
            control_curves(study, shuffled))  # fmt: skip
