"""Claims of several seeds jointly: the seed is the unit, and no interval is shorter than that over images."""

import json

import numpy as np
import probe_runs
import pytest
import scipy.stats
import tiny_models
import torch

from probes.cli import main
from probes.report.seeds import mean_over_seeds
from probes.report.study import read_studies

STUDIES = 500
CURVE = [0.5, 0.4, 0.5, 0.6, 0.7, 0.7]


def test_interval_equals_scipys_t_and_is_never_shorter_than_that_over_images():
    values = [0.1, 0.3, 0.2, 0.25]
    narrow = [(value, [value - 0.001, value + 0.001]) for value in values]
    value, ci95 = mean_over_seeds(narrow)
    low, high = scipy.stats.t.interval(0.95, 3, np.mean(values), scipy.stats.sem(values))
    assert value == pytest.approx(np.mean(values)) and ci95 == pytest.approx([low, high])
    same = [(0.2, [0.1, 0.3])] * 3
    assert mean_over_seeds(same)[1] == pytest.approx([0.1, 0.3]), "seeds that agree say nothing of other images"


@pytest.mark.parametrize("shared_images", [True, False])
@pytest.mark.parametrize("spread", [0.0, 0.05, 0.3])
def test_interval_covers_the_mean_over_seeds_and_images(spread, shared_images):
    """Hierarchical data: seeds differ by `spread`, images by 0.5; five seeds of 50 images."""
    generator, covered = torch.Generator().manual_seed(0), 0
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    for _ in range(STUDIES):
        images = 0.5 * (draw(1, 50) if shared_images else draw(5, 50))
        data = spread * draw(5, 1) + images + 0.1 * draw(5, 50)
        halves = 1.96 * data.std(1) / 50**0.5
        estimates = [(m, [m - h, m + h]) for m, h in zip(data.mean(1).tolist(), halves.tolist(), strict=True)]
        low, high = mean_over_seeds(estimates)[1]
        covered += low <= 0 <= high
    assert covered >= 0.93 * STUDIES


def write(folder, root, seed, mask="causal", quality=CURVE, **options):
    images = {"seed": seed, "dataset": "toy world", "images": 40 + seed}  # each seed has images of its own
    return str(probe_runs.write_run(folder, quality, root=root, mask=mask, metrics={"seed": seed}, **images | options))


def test_report_joins_runs_of_several_seeds(tmp_path, capsys):
    root = tiny_models.write_segmentation(tmp_path / "data", 1, 1)
    runs = [write(tmp_path / f"{seed}", root, seed) for seed in (0, 1, 2)]
    controls = [write(tmp_path / f"control{seed}", root, seed, untrained=True) for seed in (0, 1, 2)]
    assert [(study.seed, len(study.untrained)) for study in read_studies(runs + controls)] == [(0, 1), (1, 1), (2, 1)]
    assert [study.seed for study in read_studies(runs[:1])] == [None], "one seed is not named"
    main(["report", *runs, *controls, "--out", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out/results.json").read_text())
    (joint,) = results["joint"]
    assert joint["seeds"] == [0, 1, 2] and len(results["studies"]) == 3
    for entry in joint["claims"]:
        own = [
            next(claim for claim in study["claims"] if claim["claim"] == entry["claim"]) for study in results["studies"]
        ]
        assert entry["value"] == pytest.approx(np.mean([claim["value"] for claim in own]))
        assert list(entry["verdicts"]["paper"]["by_seed"].values()) == [claim["value"] for claim in own]
        assert entry["verdicts"]["paper"]["verdict"] == "not converged" and not entry["supported"]
        assert entry["verdicts"]["paper"]["reason"].startswith("seed 0: ")
    assert "seeds 0, 1, 2 jointly" in capsys.readouterr().out
    assert "seeds 0, 1, 2 jointly" in (tmp_path / "out/index.html").read_text()
