"""Effects of solved probes at three strengths, compared with loops in numpy; studies and reports with solved runs."""

import numpy as np
import probe_runs
import pytest
import torch
from reference import miou_of_counts
from report_parts import CURVE, FLAT, claims_of, studies_of

from llava_bidir.common.bootstrap import bootstrap_weights, simultaneous_band
from probes.report.claims import evaluate_claims
from probes.report.measure import effects_of_study, read_key
from probes.score.effects import EffectSource, cross_validated_layers, image_folds
from probes.score.estimate import Estimate
from probes.score.strengths import ROWS, Strengths

NO_DROP = [0.4, *CURVE[1:]]
CONTROL = {"solved": True, "untrained": ["adapter", "llm"]}
EFFECTS = ("adapter_drop", "recovery", "recovery_trained")
SITES = ["encoder", "adapter", "layer_01", "layer_02", "layer_03"]


# ------------------------------------------------------------------------------------------------ numpy
def miou_at(counts, site, weights=None) -> float:
    """mIoU with all images read at one site, or each one at its own."""
    right, predicted, labelled = (np.asarray(x) for x in counts[:3])
    place = site, np.arange(len(labelled))
    return miou_of_counts(
        right[place], predicted=predicted[place], labelled=labelled, weights=weights
    )


def numpy_layers(counts, fold, weights=None) -> list[int]:
    """Index of the best layer on the other folds, per image; on all images if the others have no weight."""
    right, predicted, labelled = (np.asarray(x) for x in counts[:3])
    weights = np.ones(len(labelled)) if weights is None else weights
    chosen = []
    for image in range(len(labelled)):
        others = np.flatnonzero(fold != fold[image])
        if not weights[others].any():
            others = np.arange(len(labelled))
        score = [
            miou_of_counts(
                right[i][others],
                predicted=predicted[i][others],
                labelled=labelled[others],
                weights=weights[others],
            )
            for i in (2, 3, 4)
        ]
        chosen.append(2 + int(np.argmax(score)))
    return chosen


# ------------------------------------------------------------------------------------------------ numbers
def test_band_without_spread_has_no_width_and_resamplings_without_a_value_do_not_count():
    resampled = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    resampled[:, 1] = 4.0
    with_nan = torch.cat([resampled, torch.tensor([[0.0, float("nan"), 50.0]])])
    expected, got = (
        torch.stack(simultaneous_band(torch.zeros(3), x)) for x in (resampled, with_nan)
    )
    assert torch.equal(expected, got)
    assert expected[:, 1].tolist() == [0, 0]


def test_one_group_is_folded_as_without_groups():
    assert image_folds(3, torch.tensor([4, 4, 4])).tolist() == [0, 1, 2]


@pytest.mark.parametrize("groups", [None, torch.arange(23) % 4])
def test_each_resampling_chooses_layers_as_a_loop_does(groups):
    """Layers are so similar that folds disagree about the best."""
    counts = probe_runs.random_counts([0.6, 0.5, 0.6, 0.6, 0.6], images=23, classes=4, seed=1)
    fold = np.arange(23) % 10 if groups is None else np.asarray(groups)
    weights = bootstrap_weights(23, 30, groups=groups)
    weights[0] = 1.0
    weights[1] = torch.as_tensor(fold == 3).float()  # all images in one fold
    task = probe_runs.CLASSES_TASK
    sums = probe_runs.sums_of(counts)
    chosen = cross_validated_layers(
        task, sums=sums[2:].double(), fold=torch.as_tensor(fold), weights=weights.double()
    )
    expected = [numpy_layers(counts, fold, row) for row in weights.numpy()]
    assert (chosen[:, fold] + 2).tolist() == expected
    assert len(set(expected[0])) > 1  # the folds disagree, so that the plain maximum would differ
    assert len({tuple(row) for row in expected}) > 5  # and so do resamplings

    source = EffectSource(SITES, last_layer=None, task=task, weights=weights, groups=groups)
    best = source.terms(sums)["best_layer"]
    vector = best.score.vector
    by_hand = [miou_at(counts, *x) for x in zip(expected, weights.numpy(), strict=True)]
    assert vector[1:].tolist() == pytest.approx(by_hand)
    assert vector[0] == vector[1]  # the dataset, and weights of 1
    assert best.sites == sorted(set(expected[0]))


def strengths_of(paths) -> dict[str, Estimate]:
    """The effects of a study under the causal mask by name and row of strengths, EFFECT@ROW."""
    effects = effects_of_study(*studies_of(paths))
    estimates = {}
    for name in [f"{effect}@{row}" for effect in EFFECTS for row in ROWS]:
        key = read_key(name, mask="causal", weights="trained", solved=True)
        if key in effects:
            estimates[name] = effects[key][0]
    return estimates


def test_rows_equal_numpy_with_the_simultaneous_band_of_the_shared_resamplings(write):
    """The drop-off vanishes at the stronger row."""
    paths = [write("solved", CURVE, 5, solved=True, options={"stronger": NO_DROP})]
    paths.append(write("control", FLAT, 6, **CONTROL))
    rows = strengths_of(paths)
    runs = [*map(probe_runs.ProbeRun, paths)]
    weights = runs[0].weights.numpy()
    # of each run at each row: right, predicted, and labelled pixels
    path, untrained = (
        [
            (*x[:2], x[2][0])
            for x in probe_runs.sums_by_strength(run).unflatten(-1, (3, -1)).movedim(-2, 1)
        ]
        for run in runs
    )
    fold = np.arange(40) % 10
    drops = []
    for name, *counts in zip(ROWS, path, untrained, strict=True):
        gains = [miou_at(x, numpy_layers(x, fold)) - miou_at(x, 1) for x in counts]
        drop, resampled = (
            miou_at(counts[0], 0, w) - miou_at(counts[0], 1, w) for w in (None, weights)
        )
        drops.append(resampled)
        expected = [drop, gains[0], gains[0] - gains[1]]
        found = [rows[f"{effect}@{name}"].value for effect in EFFECTS]
        assert found == pytest.approx(expected)
    assert len(rows) == 3 * 3
    drops = np.array(drops)
    sd = drops.std(1, ddof=1, keepdims=True)
    quantile = np.quantile((np.abs(drops - drops.mean(1, keepdims=True)) / sd).max(0), 0.95)
    column = claims_of(paths)["adapter_drop"]["verdicts"]["optimum"]
    assert column["row"] == "stronger"
    half = [abs(end - column["value"]) for end in column["ci95"]]
    assert half == pytest.approx([quantile * sd[0, 0]] * 2, rel=1e-5)


def path_of(site: str, strengths: list[float], chosen: float) -> dict:
    """The path of a site all of whose strengths are solved."""
    return {
        "site": site,
        "strengths": strengths,
        "miou": [0.5] * len(strengths),
        "chosen": chosen,
        "lowest": chosen,
    }


def test_rows_follow_the_choice_of_each_site():
    """A site whose choice is at an end keeps it where it has no neighbour."""
    sites = [path_of("encoder", [3.0, 0.3, 0.03], 0.3)]
    sites += [path_of(site, [1.0, 0.1, 0.01], 0.01) for site in ("adapter", "layer_01")]
    strengths = Strengths(sites, "miou")
    rows = {name: row.tolist() for name, row in strengths.neighbours().items()}
    assert rows == {"stronger": [0, 1, 1], "chosen": [1, 2, 2], "weaker": [2, 2, 2]}
    strengths = Strengths([path_of("adapter", [1.0, 0.1, 0.01], 1.0)], "miou")
    assert list(strengths.neighbours()) == ["chosen", "weaker"], "no site has a stronger one"


@pytest.mark.parametrize(
    ("unconverged", "is_control", "missing"),
    [
        ([("weaker", "encoder")], False, ["adapter_drop@weaker"]),
        ([(row, "layer_01") for row in ROWS], False, []),
        ([(row, "layer_03") for row in ROWS], False, [f"recovery@{row}" for row in ROWS]),
        ([("weaker", "adapter")], True, ["recovery_trained@weaker"]),
    ],
)
def test_rows_count_if_the_sites_that_they_read_have_converged(
    unconverged, is_control, missing, write
):
    """The encoder is read at that strength, the best layer is layer 3; the untrained model must converge, too."""
    options = {"unconverged": unconverged}
    if is_control:
        runs = [
            write("run", CURVE, solved=True),
            write("control", FLAT, options=options, **CONTROL),
        ]
    else:
        runs = [write("run", CURVE, solved=True, options=options)]
    found = strengths_of(runs)
    assert [name for name, x in found.items() if not x.about["converged"]] == missing


# ------------------------------------------------------------------------------------------------ studies
def test_effects_never_mix_solved_and_trained_probes(write, caplog):
    """Curves and Table 2 had shown trained probes of one mask beside solved ones of the other."""
    sgd = write("sgd", CURVE)
    control = write("control", FLAT, 6, **CONTROL)
    sgd_control = write("sgd_control", FLAT, 3, untrained=CONTROL["untrained"])
    solved = write("solved", CURVE, solved=True)
    other = write("other", CURVE, 1, mask="bidirectional", solved=True)
    for runs, known in (
        ([sgd, control], 0),
        ([solved, sgd_control], 0),
        ([solved, sgd_control, control], 1),
    ):
        (study,) = studies_of(runs)
        names = [claim["claim"] for claim in evaluate_claims(study)]
        assert names.count("recovery_trained") == known
    for runs, main, left_out in (
        ([other, sgd, solved], [solved, other], sgd),
        ([sgd, other], [sgd], other),
    ):
        (study,) = studies_of(runs)
        assert [str(run.path) for run in study.main_runs.values()] == main
        assert f"{left_out} is left out" in caplog.text
