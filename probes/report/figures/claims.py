"""Figure of the claims: trained models beside models with random weights, one row per claim and mask."""

from matplotlib.lines import Line2D

from probes.analyses.claims import CLAIMS
from probes.analyses.style import (
    COLOURS,
    INTERVALS,
    FigureData,
    Figures,
    ReportFigure,
    mask_colour,
    new_axes,
)
from probes.report.verdicts import COLUMNS
from probes.runs.formatting import Entry, Rows, value_columns

# What is drawn of a claim: offset within its row, look and label.
STYLES = {
    "paper": (-0.2, {"marker": "o", "mfc": "white"}, "as the paper measures it"),
    "optimum": (0.0, {"marker": "o"}, "probes at the optimum"),
    "random": (
        0.22,
        {
            "marker": "D",
            "mfc": "none",
            "color": "#444444",
        },
        "random models",
    ),
    "trained_like_random": (
        0.22,
        {"marker": "d", "ms": 5.5},
        "trained model, same probes as the random ones",
    ),
}
POINT = {"ls": "", "ms": 4.5}


def claim_values(claims: list[Entry], has_llm: bool) -> FigureData:
    """Draw each claim as measured and at the optimum, with intervals, beside the same number of each random model.

    A filled diamond is the trained model with the probes of the random ones; a circle can be at another strength.

    "recovery_trained" is left out: it is a difference to models with random weights.
    """
    claims = [claim for claim in claims if claim["claim"] != "recovery_trained"]
    figure, ax = new_axes(6.4, 0.9 + 0.3 * len(claims))
    rows = []
    for y, claim in enumerate(claims):
        colour = mask_colour(claim["image_attention"]) if has_llm else COLOURS[0]
        for row in _rows(claim):
            rows.append(row)
            kind = "random" if row["of"].startswith("random_") else row["of"]
            if kind not in STYLES:  # the difference of diamonds
                continue
            offset, style, _ = STYLES[kind]
            if row["low"] is not None:
                ends = [100 * row["low"], 100 * row["high"]]
                ax.plot(ends, [y + offset] * 2, color=colour, lw=1.3)
            ax.plot([100 * row["value"]], [y + offset], **(POINT | {"color": colour} | style))
    labels = [CLAIMS[claim["claim"]].name for claim in claims]
    if has_llm:
        masks = [claim["image_attention"] for claim in claims]
        labels = [f"{label} ({mask})" for label, mask in zip(labels, masks, strict=True)]
    ax.set_yticks(range(len(claims)), labels, fontsize=8)
    ax.set_ylim(len(claims) - 0.5, -0.5)
    ax.axvline(0, color="black", lw=0.8)
    ax.set_xlabel("percentage points")
    handles = [
        Line2D([], [], label=label, **(POINT | style | {"color": "#444444", "ms": 4.5}))
        for _, style, label in STYLES.values()
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=2,
        fontsize=8,
    )
    return FigureData(figure, rows)


def _rows(claim: Entry) -> Rows:
    """Return the numbers of a claim: of its columns with their intervals, and of each model that is compared."""
    columns = claim["verdicts"]
    drawn = {name: columns[name] for name in COLUMNS if columns[name]["ci95"] is not None}
    draws = columns["beyond_random"].get("by_draw", [])
    alone = {"trained_like_random": columns["beyond_random"]["trained"]} if draws else {}
    alone |= {f"random_{i}": value for i, value in enumerate(draws)}
    drawn |= {name: {"value": value, "ci95": None} for name, value in alone.items()}
    about = {"claim": claim["claim"], "image_attention": claim["image_attention"]}
    return [about | {"of": name} | value_columns(entry) for name, entry in drawn.items()]


def claim_figures(claims: list[Entry], has_llm: bool) -> Figures:
    """Yield the figure of claims beside controls, if there are random models."""
    if not any("by_draw" in claim["verdicts"]["beyond_random"] for claim in claims):
        return
    if has_llm:
        random = (
            "random LLMs, or permuted ones if a claim fares worse beyond these, show as well (the adapter's drop: "
            "random adapters)"
        )
        same_probes = (
            "All diamonds of a row have the same probes; a filled circle of drop or recovery is at the "
            "strength where the claim fares worst."
        )
    else:
        random = "random layers, or permuted ones if a claim fares worse beyond these, show as well"
        same_probes = (
            "All diamonds of a row have the same probes; a filled circle is at the strength where the "
            "claim fares worst."
        )
    yield ReportFigure(
        "claims",
        "Trained and random models",
        "The number of each claim. Look for filled diamonds that lie beyond the hollow ones: what "
        f"{random} need not be learned. {same_probes} {INTERVALS}",
        claim_values(claims, has_llm),
    )
