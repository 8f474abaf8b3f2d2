"""The table of sites beside random models: against numpy on the runs' counts, and where the truth is planted."""

from pathlib import Path

import numpy as np
import pandas as pd
import probe_runs
import pytest
import tiny_models
from report_parts import CURVE, FLAT, miou, studies_of

from llava_bidir.common.bootstrap import bootstrap_weights
from probes.report.sites import site_rows
from probes.report.tables import NAMES
from probes.report.words import shown
from probes.runs.study import StudyRuns

IMAGES = 40


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Return a function that writes a study with a curve of the model, one of its random LLMs, and as many draws."""
    monkeypatch.chdir(tmp_path)
    root = tiny_models.write_segmentation(Path("data"), 1, 1)

    def write(model: list[float], random: list[float], draws: int = 3) -> StudyRuns:
        runs = []
        options = {
            "root": root,
            "mask": "causal",
            "images": IMAGES,
        }
        for draw in range(-1, draws):
            metrics = (
                {
                    "untrained": ["llm"],
                    "match": "update",
                    "draw": draw,
                }
                if draw >= 0
                else {}
            )
            curves = [model if draw < 0 else random] * 3
            more = {"seed": draw + 9, "metrics": metrics}
            runs.append(probe_runs.write_solved(Path(f"run{draw}"), curves, **more, **options))
        return studies_of(runs)[0]

    return write


def rows_of(study: StudyRuns):
    """Return the rows of the trained model's main score by site."""
    rows = shown(pd.DataFrame(site_rows(study, "A"), columns=NAMES["sites"]))
    rows = rows[rows["main"] & (rows["metric"] == "miou")]
    return {row.site: row for row in rows.itertuples()}


def test_differences_and_intervals_equal_numpy(study):
    runs = study(CURVE, FLAT)
    rows = rows_of(runs)
    draws = runs.where(arm="random")
    assert len(draws) == 3
    weights = bootstrap_weights(IMAGES, seed=0).double().numpy()
    own, drawn = miou(runs.first), np.array([miou(run) for run in draws])
    others = np.mean([miou(run, weights) for run in draws], 0)
    resampled = miou(runs.first, weights) - others
    for site, name in enumerate(runs.first.sites):
        row = rows[name]
        assert row.value == pytest.approx(own[site])
        if name in ("encoder", "adapter"):
            assert np.isnan([row.draws, row.random]).all(), "nothing is random there"
            continue
        assert row.random == pytest.approx(drawn[:, site].mean())
        assert row.minus_random == pytest.approx(own[site] - row.random)
        half = np.quantile(np.abs(resampled[site] - resampled[site].mean()), 0.95)
        # Student's t, 2 degrees of freedom
        of_draws = 4.302653 * drawn[:, site].std(ddof=1) / 3**0.5
        assert row.minus_high - row.minus_random == pytest.approx(np.hypot(half, of_draws), 1e-4)


@pytest.mark.parametrize(
    ("model", "random", "signs"),
    [(CURVE, FLAT, "▲▲▲▲"), (FLAT, CURVE, "▼▼▼▼"), (FLAT, FLAT, "")],
)
def test_planted_gains_and_losses_are_marked_and_nothing_of_equal_models(
    study,
    model,
    random,
    signs,
):
    rows = rows_of(study(model, random))
    assert "".join(row.arrow for row in rows.values()) == signs


def test_one_draw_has_a_difference_and_no_interval(study):
    row = rows_of(study(CURVE, FLAT, draws=1))["layer_03"]
    assert row.minus_random > 0.1 and np.isnan([row.minus_low, row.minus_high]).all()
    assert row.arrow == ""
