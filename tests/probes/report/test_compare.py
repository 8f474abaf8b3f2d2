"""Comparisons of models on the same photos: pairs, intervals, classes, and names."""

import re
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import probe_runs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from probe_runs import CLASSES_TASK
from report_parts import CURVE, differs, miou, studies_of
from safetensors.torch import load_file, save_file

from probes.cli import main
from probes.report.best_layers import (
    BEST_LAYER,
    BestDifference,
    correct_for_pairs,
    detectable_difference,
    difference_of_best,
    find_difference,
)
from probes.report.compare import FEWEST_PHOTOS, LEFT_OUT, compare_runs, difference_rows, pair_sites
from probes.runs.read import ProbeRun
from probes.runs.study import read_studies
from probes.score.estimate import Estimate, widening_for
from probes.tasks import TASKS

WORSE = [x - 0.1 for x in CURVE]
MASKS = ("causal", "bidirectional")
MANY = 10**6  # photos


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


def test_each_model_is_compared_with_the_first_and_best_layers_with_all(write):
    runs = []
    for name, quality in (("a", CURVE), ("b", WORSE), ("c", CURVE)):
        for i, data in enumerate(("street", "room")):
            run = write(f"{name}_{data}", quality, number=i, dataset=data)
            runs.append(f"{name}={run}")
    rows = compared(*runs)
    full = {(row["first"], row["second"], row["data"]) for row in rows if row["of"] == "site"}
    best = {(row["first"], row["second"], row["data"]) for row in rows if row["of"] == BEST_LAYER}
    assert full == {(x, y, data) for x, y in ("AB", "AC") for data in ("street", "room")}
    assert best == full | {("B", "C", "street"), ("B", "C", "room")}


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


def test_layers_of_an_encoder_are_tested_and_the_best_of_them_compared(write, tmp_path, capsys):
    """As after a training of the encoder; no layer of the LLM was probed, and none counted among its layers."""
    runs = []
    for name, scores in (("before", [0.4, 0.8, 0.7]), ("after", [0.4, 0.5, 0.3])):
        sites = ["encoder_00", "encoder_01", "encoder"]
        options = {"sites": sites}
        runs.append(ProbeRun(write(name, scores, options=options, last_layer="layer_09")))
    rows = {(row["of"], row["name"]): row for row in compare_runs(*runs)}
    assert rows["site", "encoder_00"]["finding"] not in ("better", "worse")
    for of, name in (("site", "encoder_01"), ("site", "encoder"), (BEST_LAYER, BEST_LAYER)):
        assert rows[of, name]["finding"] == "worse"
    best = rows[BEST_LAYER, BEST_LAYER]
    assert (best["site"], best["second_site"]) == ("encoder_01", "encoder_01")
    assert best["difference"] == pytest.approx(rows["site", "encoder_01"]["difference"])
    named = [f"{name}={run.path}" for name, run in zip(("before", "after"), runs, strict=True)]
    main(["report", *named, "--out", str(tmp_path / "report")])
    said = capsys.readouterr().out
    assert "% mIoU at encoder layer 1" in said and "points less" in said
    for text in (said, (tmp_path / "report/index.html").read_text()):
        assert "cannot be compared" not in text and not re.search(r"\d of 9", text)


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
        difference = difference_of_best(1, *models, counts=(MANY, MANY))
        low, high = difference.interval
        covered += low <= 0 <= high
        best = [max(scores, key=lambda score: score.value) for scores in models]
        assert difference.value == pytest.approx(best[1].value - best[0].value)
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
    difference = difference_of_best(sign, *models, counts=(MANY, MANY))
    assert sorted(sign * end for end in difference.interval) == pytest.approx(expected)


def scores_of(observed: np.ndarray, drawn: np.ndarray) -> list[Estimate]:
    """Estimates of observed scores f[S] and their values under resampling f[R, S]."""
    return [Estimate(value, torch.tensor(x)) for value, x in zip(observed, drawn.T, strict=True)]


@settings(max_examples=60, deadline=None)
@given(
    units=st.sampled_from([20, MANY]),
    seed=st.integers(0, 10**6),
    shift=st.floats(-0.1, 0.1),
    sign=st.sampled_from([1, -1]),
)
def test_the_p_value_is_one_minus_the_level_of_the_widest_band_without_zero(
    units, seed, shift, sign
):
    """Found by bisection over the half width of the bands, in standard deviations."""
    rng = np.random.default_rng(seed)
    observed = rng.normal(0.5, 0.03, (2, 3))
    drawn = observed + rng.normal(0, 0.02, (200, 2, 3))
    observed[1] += shift
    drawn[:, 1] += shift
    difference = difference_of_best(
        sign,
        *(scores_of(sign * observed[m], sign * drawn[:, m]) for m in (0, 1)),
        counts=(units, units),
    )
    widening = widening_for(units)
    pairs = observed[1][:, None] - observed[0]
    resampled = drawn[:, 1, :, None] - drawn[:, 0, None]
    sd = resampled.std(0, ddof=1)
    largest = (abs(resampled - resampled.mean(0)) / sd).max((1, 2))

    def excludes_zero(factor: float) -> bool:
        low, high = ((pairs + side * factor * sd).min(1).max() for side in (-1, 1))
        return low > 0 or high < 0

    narrow, wide = 0.0, 100.0
    for _ in range(60):
        middle = (narrow + wide) / 2
        narrow, wide = (middle, wide) if excludes_zero(middle) else (narrow, middle)
    assert difference.p == pytest.approx(
        (1 + (widening * largest >= narrow).sum()) / 201, abs=1.01 / 201
    )
    low, high = difference.interval
    assert (low > 0 or high < 0) == excludes_zero(np.quantile(largest, 0.95))


def test_few_photos_widen_as_student_does():
    """The quantile of 19 degrees of freedom is 2.093; a bootstrap's variance lacks a twentieth."""
    assert widening_for(20) == pytest.approx(2.093 / 1.96 * (20 / 19) ** 0.5, rel=1e-3)
    assert widening_for(MANY) == pytest.approx(1, rel=1e-4)


def test_equal_runs_differ_by_nothing():
    scores = np.full(3, 0.5)
    drawn = np.random.default_rng(0).normal(0.5, 0.02, (200, 3))
    difference = difference_of_best(1, *[scores_of(scores, drawn)] * 2, counts=(20, 20))
    low, high = difference.interval
    assert difference.p == 1 and low <= 0 <= high


@pytest.mark.parametrize(
    ("interval", "narrow", "p", "units", "finding"),
    [
        ((0.02, 0.06), (0.025, 0.055), 0.001, 20, "better"),
        ((-0.06, -0.02), (-0.055, -0.025), 0.001, 20, "worse"),
        ((-0.06, -0.02), (-0.055, -0.025), 0.001, 9, "undecided"),
        ((-0.011, 0.007), (-0.009, 0.005), 0.4, 20, "no effect"),
        ((0.001, 0.009), (0.002, 0.008), 0.01, 20, "negligible"),
        ((-0.01, 0.012), (-0.008, 0.0101), 0.4, 20, "undecided"),
        (
            (0.001, 0.018),
            (0.002, 0.017),
            0.01,
            20,
            "undecided",
        ),  # less than a point, and can be more
    ],
)
def test_what_intervals_say_of_two_runs(interval, narrow, p, units, finding):
    value = sum(interval) / 2
    difference = BestDifference(
        first_value=0.5,
        second_value=0.5 + value,
        interval=interval,
        equivalence_interval=narrow,
        p=p,
        half_width=0.02,
    )
    assert difference.finding(CLASSES_TASK, units) == finding


@pytest.mark.parametrize(("task", "finding"), [("segmentation", "better"), ("depth", "worse")])
def test_a_higher_score_is_better_only_if_the_task_says_so(task, finding):
    about = {"value": 0.3, "ci95": (0.2, 0.4), "ci90": (0.22, 0.38), "p": 0.001, "units": 20}
    assert find_difference(TASKS[task], **about) == finding


def test_the_detectable_difference_is_found_in_four_of_five_studies():
    """Of an estimate whose band of all layers is 2.6 standard deviations wide."""
    sd = 0.02
    difference = detectable_difference(2.6 * sd, margin=0.01)
    observed = np.random.default_rng(0).normal(difference, sd, 4000)
    assert (observed > 2.6 * sd).mean() == pytest.approx(0.8, abs=0.02)
    assert detectable_difference(0.0001, margin=0.01) == pytest.approx(0.01, abs=1e-4)


def test_findings_are_corrected_for_the_pairs_of_the_same_photos():
    """Of claims and of other data they are not."""
    rows = []
    for data, p in (("a", 0.01), ("a", 0.03), ("a", 0.04), ("b", 0.04)):
        about = {"of": BEST_LAYER, "task": "segmentation", "data": data, "seed": None}
        rows.append(about | {"p": p, "finding": "better"})
    correct_for_pairs([*rows, {"of": "site", "p": 0.0}])
    assert [row["p_holm"] for row in rows] == pytest.approx([0.03, 0.06, 0.06, 0.04])
    assert [row["finding"] for row in rows] == ["better", "undecided", "undecided", "better"]


@pytest.mark.parametrize("masks", [("causal", "bidirectional"), ("causal", "prefix", "rows")])
def test_masks_of_a_model_are_compared_by_name(write, masks):
    """Any number of them: each with the first, and the best layers of all."""
    runs = [write(mask, CURVE, number=i, mask=mask) for i, mask in enumerate(masks)]
    rows = compared(*runs)
    full = {(row["first"], row["second"]) for row in rows if row["of"] == "site"}
    best = {(row["first"], row["second"]) for row in rows if row["of"] == BEST_LAYER}
    assert full == {(masks[0], other) for other in masks[1:]}
    assert best == {*combinations(masks, 2)}


def test_models_without_a_mask_in_common_are_compared_at_their_best_layers(write):
    runs = [f"{mask}={write(mask, CURVE, mask=mask)}" for mask in MASKS]
    (row,) = compared(*runs)
    assert (row["of"], row["mask"]) == (BEST_LAYER, "causal, bidirectional")


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
