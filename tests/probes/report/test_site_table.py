"""The table of sites beside random models: against numpy on the runs' counts, and where the truth is planted."""

import numpy as np
import pandas as pd
import pytest
from report_parts import CURVE, FLAT, miou, studies_of

from llava_bidir.common.bootstrap import bootstrap_weights
from probes.report.sites import site_rows
from probes.report.tables import NAMES
from probes.report.verdicts import MARGIN
from probes.report.words import shown
from probes.runs.study import StudyRuns


@pytest.fixture
def study(write, draws):
    """Return a function that writes a study with a curve of the model, one of its random LLMs, and as many draws."""

    def study(model: list[float], random: list[float], count: int = 3) -> StudyRuns:
        random_llms = draws(*[random] * count, first=9, matches=["update"])
        return studies_of([write("run", model, 8, solved=True), *random_llms])[0]

    return study


def rows_of(study: StudyRuns):
    """Return the rows of the trained model's main score by site."""
    rows = shown(
        pd.DataFrame(site_rows(study, "A"), columns=NAMES["sites"]), {"segmentation": MARGIN}
    )
    rows = rows[rows["main"] & (rows["metric"] == "miou")]
    return {row.site: row for row in rows.itertuples()}


def test_differences_and_intervals_equal_numpy(study):
    runs = study(CURVE, FLAT)
    rows = rows_of(runs)
    draws = runs.where(arm="random")
    assert len(draws) == 3
    weights = bootstrap_weights(40, seed=0).double().numpy()
    trained_miou, drawn = miou(runs.first), np.array([miou(run) for run in draws])
    others = np.mean([miou(run, weights) for run in draws], 0)
    resampled = miou(runs.first, weights) - others
    for site, name in enumerate(runs.first.sites):
        row = rows[name]
        assert row.value == pytest.approx(trained_miou[site])
        if name in ("encoder", "adapter"):
            assert np.isnan([row.draws, row.random]).all(), "nothing is random there"
            continue
        assert row.random == pytest.approx(drawn[:, site].mean())
        assert row.minus_random == pytest.approx(trained_miou[site] - row.random)
        half = np.quantile(np.abs(resampled[site] - resampled[site].mean()), 0.95)
        # Student's t, 2 degrees of freedom
        of_draws = 4.302653 * drawn[:, site].std(ddof=1) / 3**0.5
        assert row.minus_high - row.minus_random == pytest.approx(np.hypot(half, of_draws), 1e-4)


@pytest.mark.parametrize(
    ("model", "random", "count", "signs"),
    [
        (CURVE, FLAT, 3, "▲▲▲▲"),
        (FLAT, CURVE, 3, "▼▼▼▼"),
        (FLAT, FLAT, 3, ""),
        (CURVE, FLAT, 1, ""),  # one draw has a difference and no interval
    ],
)
def test_planted_gains_and_losses_are_marked_and_nothing_of_equal_models(
    study, model, random, count, signs
):
    rows = rows_of(study(model, random, count))
    assert "".join(row.arrow for row in rows.values()) == signs
    if count == 1:
        last = rows["layer_03"]
        assert last.minus_random > 0.1 and np.isnan([last.minus_low, last.minus_high]).all()
