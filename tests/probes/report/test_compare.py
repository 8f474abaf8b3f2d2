"""Comparisons of models on the same photos: pairs, intervals, classes, and names."""

import shutil
from pathlib import Path

import numpy as np
import probe_runs
import pytest
import torch
from report_parts import CURVE, differs, miou, studies_of
from safetensors.torch import load_file, save_file

from probes.report.compare import (
    FEWEST_PHOTOS,
    LEFT_OUT,
    compare_runs,
    difference_of_best,
    difference_rows,
    pair_sites,
)
from probes.runs.read import ProbeRun
from probes.runs.study import read_studies
from probes.score.estimate import Estimate

WORSE = [x - 0.1 for x in CURVE]
MASKS = ("causal", "bidirectional")


def compared(*words: str) -> list[dict]:
    """The differences of models that are named A, B, ..."""
    studies = studies_of(words)
    names = dict.fromkeys(study.name for study in studies)
    return [*difference_rows(studies, dict(zip(names, "ABC", strict=False)))]


def test_a_class_in_too_few_photos_is_not_tested(write):
    """Its interval is within what a difference can be. The second model's probes take class 0 for class 1."""
    runs = []
    for name in ("first", "second"):
        path = Path(write(name, CURVE))
        counts = load_file(path / "counts.safetensors")
        counts["labelled"][FEWEST_PHOTOS - 1 :, 0] = 0
        counts["intersection"][:, FEWEST_PHOTOS - 1 :, 0] = 0
        if name == "second":
            counts["predicted"][..., 1] += counts["predicted"][..., 0]
            counts["predicted"][..., 0] = 0
            counts["intersection"][..., 0] = 0
        save_file(counts, path / "counts.safetensors")
        probe_runs.write_effects(path)
        runs.append(ProbeRun(path))
    first, *others = (row for row in compare_runs(*runs) if row["of"] == "class")
    assert (first["photos"], first["p"]) == (FEWEST_PHOTOS - 1, None)
    assert -1 <= first["low"] < first["difference"] < 0 and not differs(first)
    assert all(row["photos"] > 30 and row["p"] is not None for row in others)


def test_models_of_one_folder_in_the_report_are_refused(write):
    """Figures and tables of one would replace the other's."""
    runs = [f"{name}={write(name, CURVE)}" for name in ("clip vicuna", "clip_vicuna")]
    with pytest.raises(
        ValueError, match="have the folder clip_vicuna_toy_world .*; name the models"
    ):
        studies_of(runs)


def test_each_model_is_compared_with_the_first_of_its_data(write):
    runs = []
    for name, quality in (("a", CURVE), ("b", WORSE), ("c", CURVE)):
        for i, data in enumerate(("street", "room")):
            run = write(f"{name}_{data}", quality, number=i, dataset=data)
            runs.append(f"{name}={run}")
    found = [(row["first"], row["second"], row["data"]) for row in compared(*runs)]
    expected = {(x, y, data) for x, y in ("AB", "AC") for data in ("street", "room")}
    assert {*found} == expected


def test_a_model_of_a_study_is_not_compared_with_itself(write, tmp_path):
    """Folders have other names than the models that they are of."""
    study = tmp_path / "study"
    for label, name in (("zero", "r1"), ("after", "r2")):
        shutil.move(write(name, CURVE, mllm=f"models/{name}"), study / label / "trained")
    with pytest.raises(ValueError, match="after/trained is passed twice"):
        read_studies([f"A={study}", f"B={study}/after"])


@pytest.mark.parametrize(
    ("layers", "pairs"),
    [
        (((2, 4), (3, 6)), [(2, 3), (4, 6)]),
        (((1, 4), (3, 4)), [(4, 4)]),  # layer 1 of four has no counterpart
    ],
)
def test_layers_of_equal_relative_depth_are_compared(write, layers, pairs):
    runs = []
    for name, of_model in zip("ab", layers, strict=True):
        sites = ["adapter", *(f"layer_{i:02d}" for i in of_model)]
        runs.append(ProbeRun(write(name, [0.4, 0.5, 0.6], options={"sites": sites})))
    expected = [(f"layer_{a:02d}", f"layer_{b:02d}") for a, b in pairs]
    assert pair_sites(*runs) == [("adapter", "adapter"), *expected]


def test_solved_and_trained_probes_are_not_compared(write):
    paths = [write("first", CURVE), write("second", CURVE, solved=True)]
    (row,) = compared(f"before={paths[0]}", f"after={paths[1]}")
    assert row["of"] == LEFT_OUT and "differ in probes" in row["name"]


EQUAL = [0.5] * 12
PEAKED = [0.5 - 0.03 * i for i in range(12)]


@pytest.mark.parametrize("first", [EQUAL, PEAKED])
def test_intervals_of_best_layers_cover_the_truth_whichever_are_best(first):
    """Equal layers, and one best layer against twelve, where that of the two which look best covers too little."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    covered_by_best_here = 0

    def noise(*shape):
        return 0.02 * torch.randn(*shape, generator=generator)

    for _ in range(200):
        models = []
        for true in (first, EQUAL):
            observed = torch.tensor(true) + noise(12)
            drawn = observed + noise(300, 12)
            models.append([Estimate(x.item(), y) for x, y in zip(observed, drawn.T, strict=True)])
        row = difference_of_best(1, *models)
        covered += row["low"] <= 0 <= row["high"]
        best = [max(scores, key=lambda score: score.value) for scores in models]
        assert row["difference"] == pytest.approx(best[1].value - best[0].value)
        low, high = (best[1] - best[0]).ci95
        covered_by_best_here += low <= 0 <= high
    assert covered >= 190
    if first is PEAKED:
        assert covered_by_best_here < 180, "else this test would not tell the two"


@pytest.mark.parametrize("sign", [1, -1])
def test_the_interval_of_best_layers_is_that_of_all_pairs_together(sign):
    """Of scores that are better the lower they are, it is mirrored."""
    rng = np.random.default_rng(0)
    scores = rng.random((2, 3))
    drawn = scores + 0.1 * rng.standard_normal((400, 2, 3))
    values = scores[1, :, None] - scores[0]  # of all pairs
    resampled = drawn[:, 1, :, None] - drawn[:, 0, None]
    spread = resampled.std(0, ddof=1)
    factor = np.quantile((abs(resampled - resampled.mean(0)) / spread).max((1, 2)), 0.95)
    expected = [(values + side * factor * spread).min(1).max() for side in (-1, 1)]
    models = [
        [Estimate(sign * scores[m, i], torch.tensor(sign * drawn[:, m, i])) for i in range(3)]
        for m in (0, 1)
    ]
    found = difference_of_best(sign, *models)
    assert sorted(sign * found[end] for end in ("low", "high")) == pytest.approx(expected)


def test_paired_differences_and_intervals_equal_numpy(write):
    """The half width is the 95% quantile of the distance of resampled values from their mean."""
    paths = [write("run", CURVE, i, mask=mask) for i, mask in enumerate(MASKS)]
    causal, bidirectional = map(ProbeRun, paths)
    rows = [*compare_runs(causal, bidirectional, 50)]
    difference = miou(bidirectional) - miou(causal)
    resampled = miou(bidirectional, causal.weights) - miou(causal, causal.weights)
    for i, row in enumerate(row for row in rows if row["of"] == "site"):
        assert row["site"] == causal.sites[i]
        assert row["difference"] == pytest.approx(difference[i])
        half = np.quantile(np.abs(resampled[i] - resampled[i].mean()), 0.95)
        expected = [difference[i] - half, difference[i] + half]
        assert [row["low"], row["high"]] == pytest.approx(expected, abs=1e-5)
    effects = {row["name"]: row["difference"] for row in rows if row["of"] == "effect"}
    assert effects["adapter_drop"] == pytest.approx(difference[0] - difference[1])
    peaks = [miou(run)[2:5].max() for run in (causal, bidirectional)]
    assert effects["recovery"] == pytest.approx(peaks[1] - peaks[0] - difference[1])


def test_three_groups_of_images_are_too_few(write):
    """A clear gain; images of a group are exchanged together."""
    options = {"groups": torch.arange(40) % 3}
    better = [x + 0.05 for x in CURVE]
    runs = []
    for mask, quality in zip(MASKS, (CURVE, better), strict=True):
        runs.append(ProbeRun(write("run", quality, mask=mask, options=options)))
    sites = [row for row in compare_runs(*runs) if row["of"] == "site"]
    assert all(row["p"] is None or row["p"] > 0.2 for row in sites)
