"""Figure of the claims: trained models beside models with random weights, one row per claim and mask."""

from typing import Any

from matplotlib.lines import Line2D

from probes.analyses.claims import CLAIMS
from probes.analyses.style import (
    INTERVALS,
    FigureData,
    Figures,
    ReportFigure,
    mask_colour,
    new_axes,
)
from probes.report.verdicts import COLUMNS
from probes.results.formatting import bounds

# Column -> offset within a row, whether the marker is filled
STYLES = {"paper": (-0.2, False), "optimum": (0.0, True)}
DRAWS_OFFSET = 0.22


def claim_values(claims: list[dict[str, Any]], has_llm: bool) -> FigureData:
    """Draw each claim as measured and at the optimum, with intervals, beside the same number of each random model.

    A filled diamond is the trained model with the probes of the random ones; a circle can be at another strength.

    "recovery_trained" is left out: it is a difference to models with random weights.
    """
    claims = [claim for claim in claims if claim["claim"] != "recovery_trained"]
    figure, ax = new_axes(6.4, 0.9 + 0.3 * len(claims))
    rows = []
    for y, entry in enumerate(claims):
        colour = mask_colour(entry["image_attention"])
        for name, (offset, filled) in STYLES.items():
            found = entry["verdicts"][name]
            if found["ci95"] is not None:
                low, high = (100 * bound for bound in found["ci95"])
                ax.plot([low, high], [y + offset] * 2, color=colour, lw=1.3)
                fill = colour if filled else "white"
                ax.plot(
                    [100 * found["value"]],
                    [y + offset],
                    "o",
                    color=colour,
                    mfc=fill,
                    ms=4.5,
                )
        draws = entry["verdicts"]["beyond_random"].get("by_draw", [])
        ax.plot(
            [100 * x for x in draws],
            [y + DRAWS_OFFSET] * len(draws),
            "D",
            color="#444444",
            mfc="none",
            ms=4.5,
        )
        if draws:
            trained = 100 * entry["verdicts"]["beyond_random"]["trained"]
            ax.plot(
                [trained],
                [y + DRAWS_OFFSET],
                "d",
                color=colour,
                ms=5.5,
            )
        rows += _rows(entry, draws)
    labels = [CLAIMS[claim["claim"]].name for claim in claims]
    if has_llm:
        labels = [
            f"{label} ({claim['image_attention']})"
            for label, claim in zip(labels, claims, strict=True)
        ]
    ax.set_yticks(range(len(claims)), labels, fontsize=8)
    ax.set_ylim(len(claims) - 0.5, -0.5)
    ax.axvline(0, color="black", lw=0.8)
    ax.set_xlabel("percentage points")
    figure.legend(
        handles=_legend(),
        loc="outside lower center",
        ncols=2,
        fontsize=8,
    )
    return FigureData(figure, rows)


def _rows(entry: dict[str, Any], draws: list[float]) -> list[dict[str, Any]]:
    key = {"claim": entry["claim"], "image_attention": entry["image_attention"]}
    columns = {name: entry["verdicts"][name] for name in COLUMNS}
    rows = [
        key | {"of": name, "value": found["value"]} | bounds(found["ci95"])
        for name, found in columns.items()
        if found["ci95"] is not None
    ]
    like_random = {"trained_like_random": columns["beyond_random"]["trained"]} if draws else {}
    values = like_random | {f"random_{i}": value for i, value in enumerate(draws)}
    return rows + [
        key | {"of": name, "value": value} | bounds(None) for name, value in values.items()
    ]


def _legend() -> list[Line2D]:
    point = {
        "color": "#444444",
        "ms": 4.5,
        "ls": "",
    }
    return [
        Line2D(
            [],
            [],
            marker="o",
            mfc="white",
            label="as the paper measures it",
            **point,
        ),
        Line2D(
            [],
            [],
            marker="o",
            label="probes at the optimum",
            **point,
        ),
        Line2D(
            [],
            [],
            marker="D",
            mfc="none",
            label="random models",
            **point,
        ),
        Line2D(
            [],
            [],
            marker="d",
            label="trained model, same probes as the random ones",
            **point,
        ),
    ]


def claim_figures(claims: list[dict[str, Any]], has_llm: bool) -> Figures:
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
