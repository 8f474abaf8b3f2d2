"""Figure of answers: accuracy beside the probes', and changes of the right answer under knockouts."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probes.analyses.style import (
    FigureData,
    Figures,
    ReportFigure,
    draw_intervals,
    has_depth,
    label_sites,
    mask_colour,
    site_depth,
)

from .tables import effect_rows, models_of

RANDOM_COLOUR = "#777777"
EFFECT_LABELS = {
    ("correct", "none"): "right class hidden",
    ("correct", "matched_correct"): "the same,\nless matched tokens",
    ("incorrect", "none"): "wrong class hidden",
    ("incorrect", "matched_incorrect"): "the same,\nless matched tokens",
}


def answers_and_probes(answers: dict[str, dict[str, Any]]) -> FigureData:
    """Draw a row of panels per mask: accuracies by site, and effects as means over classes; CSV file: the effects."""
    figure = Figure(figsize=(6.8, 2.7 * len(answers) + 0.2), layout="constrained")
    axes = figure.subplots(len(answers), 2, squeeze=False, width_ratios=(1.5, 1))
    for (left, right), (mask, of_mask) in zip(axes, answers.items(), strict=True):
        for model, entry in models_of(of_mask).items():
            trained = entry is of_mask
            _draw_accuracies(
                left,
                entry,
                model,
                mask_colour(mask) if trained else RANDOM_COLOUR,
                "-" if trained else ":",
            )
            _draw_effects(
                right,
                entry,
                mask_colour(mask) if trained else RANDOM_COLOUR,
                0 if trained else 0.25,
            )
        label_sites(
            left,
            [site["site"] for site in of_mask["sites"] if has_depth(site["site"])],
            fontsize=7,
        )
        left.set(title=mask, ylabel="correct at the same places (%)")
        left.legend(
            fontsize=7,
            ncols=2,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.22),
        )
        right.set_yticks(range(len(EFFECT_LABELS)), EFFECT_LABELS.values(), fontsize=7)
        right.set_ylim(len(EFFECT_LABELS) - 0.5, -0.5)
        right.axvline(0, color="black", lw=0.8)
        right.set_xlabel("change for the right answer (nats)", fontsize=8)
    return FigureData(figure, effect_rows(answers))


def _draw_accuracies(
    ax: Axes,
    entry: dict[str, Any],
    model: str,
    colour: str,
    dash: str,
) -> None:
    sites = [site for site in entry["sites"] if has_depth(site["site"])]
    shift = 0.12 * (dash == ":")  # so that the intervals of two models do not cover each other
    depths = [site_depth(site["site"]) + shift for site in sites]
    values = [site["accuracy"]["value"] for site in sites]
    ci95 = [site["accuracy"]["ci95"] for site in sites]
    draw_intervals(
        ax,
        depths,
        values,
        ci95,
        colour,
        label=f"probes, {model}",
        marker="o",
        ms=3,
        ls=dash,
        lw=1.2,
    )
    answer = 100 * entry["accuracy"]["value"]
    low, high = (100 * bound for bound in entry["accuracy"]["ci95"])
    ax.axhline(
        answer,
        color=colour,
        ls=dash,
        lw=2.2,
        label=f"answers, {model}",
    )
    ax.axhspan(
        low,
        high,
        color=colour,
        alpha=0.12,
        lw=0,
    )


def _draw_effects(
    ax: Axes,
    entry: dict[str, Any],
    colour: str,
    offset: float,
) -> None:
    means = {
        (effect["condition"], effect["control"]): effect["mean"] for effect in entry["effects"]
    }
    for y, effect in enumerate(EFFECT_LABELS):
        if (mean := means[effect])["value"] is not None:
            ends = mean["ci95"] or [mean["value"]] * 2
            ax.plot(ends, [y + offset] * 2, color=colour, lw=1.4)
            ax.plot(
                [mean["value"]],
                [y + offset],
                "o",
                color=colour,
                ms=4.5,
            )


def answer_figures(answers: dict[str, Any]) -> Figures:
    """Yield the figure of answers, if any were asked for."""
    if answers:
        yield ReportFigure(
            "answers", "Answers and probes at the same places",
            "Left: accuracy of the model's answers to questions about places (bands), and of the probes there "
            "(points). Right: change of the right answer's log-probability among the class names when the tokens of a "
            "class are hidden from other image tokens, as means over classes. Grey: random LLMs that change the states "
            "as much as the trained one. Exploratory: the paper makes no claim about answers. Lines and bands: 95% "
            "intervals over images, and over classes on the right.",
            answers_and_probes(answers), "wide",)  # fmt: skip
