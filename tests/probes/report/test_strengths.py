"""Effects of solved probes at three strengths, compared with loops in numpy; studies and reports with solved runs."""

from functools import partial

import numpy as np
import pytest
import tiny_models
import torch
from probe_runs import (
    CLASSES_TASK,
    ROWS,
    counts_by_strength,
    effects_of_counts,
    random_counts,
    sums_of,
    write_run,
    write_solved,
)
from reference import miou_of_counts
from report_parts import studies_of

from llava_bidir.common.bootstrap import bootstrap_weights, simultaneous_band
from probes.ops.pixel_counts import Counts
from probes.report.claims import evaluate_claims
from probes.report.measure import Case
from probes.runs.study import UNTRAINED
from probes.score.effects import (
    cross_validated_layers,
    image_folds,
    read_scores,
)
from probes.score.strengths import Strengths

# encoder, adapter, layers 1 to 3, final norm
CURVE = [0.6, 0.5, 0.55, 0.62, 0.7, 0.7]
FLAT = [0.6, 0.5, 0.5, 0.5, 0.5, 0.5]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_models.write_segmentation(tmp_path_factory.mktemp("data"), 1, 1)


@pytest.fixture(scope="module")
def paths(root, tmp_path_factory) -> dict[str, str]:
    """Trained runs and solved ones, trained and untrained; the drop-off vanishes at the strongest row."""
    folder = tmp_path_factory.mktemp("paths")
    curves = [[0.4, *CURVE[1:]], CURVE, CURVE]

    def converged(row, site):
        return (row, site) != ("weaker", "encoder")

    write = partial(write_solved, root=root)
    trained = partial(write_run, root=root)
    return {
        "sgd": str(trained(folder / "sgd", CURVE)),
        "sgd_untrained": str(trained(folder / "sgd_untrained", FLAT, untrained=True, seed=3)),
        "solved": write(folder / "solved", curves, converged=converged, seed=5),
        "solved_untrained": write(folder / "su", [FLAT] * 3, untrained=True, seed=6),
    }


# ------------------------------------------------------------------------------------------------ numpy
def numpy_layers(
    sites,
    counts: Counts,
    fold,
    weights=None,
) -> list[int]:
    """Index of the best layer on the other folds, per image; on all images if the others have no weight."""
    right, predicted, labelled = (np.asarray(x) for x in counts[:3])
    weights = np.ones(len(labelled)) if weights is None else weights
    layers = [i for i, site in enumerate(sites) if site.startswith("layer_")]
    chosen = []
    for image in range(len(labelled)):
        others = [other for other in range(len(labelled)) if fold[other] != fold[image]]
        if not weights[others].any():
            others = list(range(len(labelled)))
        score = [
            miou_of_counts(
                right[i][others], predicted[i][others], labelled[others], weights[others]
            )
            for i in layers
        ]
        chosen.append(layers[int(np.argmax(score))])
    return chosen


def numpy_values(
    counts: Counts,
    sites,
    fold,
    weights=None,
) -> dict[str, float]:
    """Drop-off and recovery."""
    right, predicted, labelled = (np.asarray(x) for x in counts[:3])
    images = np.arange(len(labelled))
    at = {
        "encoder": [sites.index("encoder")] * len(images),
        "adapter": [sites.index("adapter")] * len(images),
    }
    at["best"] = numpy_layers(sites, counts, fold, weights)
    miou = {
        k: miou_of_counts(right[i, images], predicted[i, images], labelled, weights)
        for k, i in at.items()
    }
    return {
        "adapter_drop": miou["encoder"] - miou["adapter"],
        "recovery": miou["best"] - miou["adapter"],
    }


def close_layers(images=23, classes=4, seed=1) -> Counts:
    """Counts of encoder, adapter and three layers so similar that folds disagree about the best."""
    return random_counts([0.6, 0.5, 0.6, 0.6, 0.6], images, classes, seed)


SITES = ["encoder", "adapter", "layer_01", "layer_02", "layer_03"]


# ------------------------------------------------------------------------------------------------ numbers
def test_band_without_spread_has_no_width_and_resamplings_without_a_value_do_not_count():
    resampled = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    resampled[:, 1] = 4.0
    with_nan = torch.cat([resampled, torch.tensor([[0.0, float("nan"), 50.0]])])
    expected, got = (simultaneous_band(torch.zeros(3), x) for x in (resampled, with_nan))
    assert torch.equal(expected[0], got[0])
    assert torch.equal(expected[1], got[1])
    assert expected[0][1] == expected[1][1] == 0


def test_one_group_is_folded_as_without_groups():
    assert image_folds(3, torch.tensor([4, 4, 4])).tolist() == [0, 1, 2]


@pytest.mark.parametrize("groups", [None, torch.arange(23) % 4])
def test_each_resampling_chooses_layers_as_a_loop_does(groups):
    counts = close_layers()
    fold = np.arange(23) % 10 if groups is None else np.asarray(groups)
    weights = bootstrap_weights(23, 30, groups=groups)
    weights[0] = 1.0
    weights[1] = torch.as_tensor(fold == 3).float()  # all images in one fold
    layers = sums_of(counts)[2:].double()
    chosen = cross_validated_layers(CLASSES_TASK, layers, torch.as_tensor(fold), weights.double())
    expected = [numpy_layers(SITES, counts, fold, row) for row in weights.numpy()]
    assert (chosen[:, fold] + 2).tolist() == expected
    assert len(set(expected[0])) > 1  # the folds disagree, so that the plain maximum would differ
    assert len({tuple(row) for row in expected}) > 5  # and so do resamplings

    readings = read_scores(
        SITES,
        None,
        CLASSES_TASK,
        sums_of(counts),
        weights,
        groups,
    )
    vector = readings["best_layer"].score.vector
    right, predicted, labelled = (np.asarray(x) for x in counts[:3])
    images = np.arange(23)
    for i, (at, row) in enumerate(zip(expected, weights.numpy(), strict=True)):
        by_hand = miou_of_counts(right[at, images], predicted[at, images], labelled, row)
        assert vector[1 + i].item() == pytest.approx(by_hand)
    assert vector[0] == vector[1]  # the dataset, and weights of 1
    assert readings["best_layer"].sites == sorted(set(expected[0]))


EFFECTS = ("adapter_drop", "recovery", "recovery_trained")


def strengths_of(study) -> dict[tuple[str, str], dict]:
    """The effects of a study under the causal mask by name and row of strengths."""
    cases = [Case(study, name, "causal", {}) for name in EFFECTS]
    return {(case.name, row["row"]): row for case in cases for row in case.strengths()}


def test_rows_equal_numpy_with_the_simultaneous_band_of_the_shared_resamplings(paths):
    (study,) = studies_of([paths["solved"], paths["solved_untrained"]])
    run = study.solved["causal"]
    (control,) = study.where(arm=UNTRAINED, solved=True)
    run.weights = control.weights = run.weights[:60]
    run.effects, control.effects = map(effects_of_counts, (run, control))
    rows = strengths_of(study)
    fold = np.arange(40) % 10
    path = counts_by_strength(run)
    untrained = counts_by_strength(control)
    for i, name in enumerate(ROWS):
        values, others = (numpy_values(p[i], run.sites, fold) for p in (path, untrained))
        values["recovery_trained"] = values["recovery"] - others["recovery"]
        assert {effect: rows[effect, name]["value"] for effect in values} == pytest.approx(values)
    assert len(rows) == 3 * 3
    drop = [
        [numpy_values(x, run.sites, fold, w)["adapter_drop"] for w in run.weights.numpy()]
        for x in path
    ]
    drop = np.array(drop)
    sd = drop.std(1, ddof=1, keepdims=True)
    quantile = np.quantile((np.abs(drop - drop.mean(1, keepdims=True)) / sd).max(0), 0.95)
    for name, s in zip(ROWS, sd[:, 0], strict=True):
        row = rows["adapter_drop", name]
        assert [abs(end - row["value"]) for end in row["ci95"]] == pytest.approx(
            [quantile * s] * 2, rel=1e-5
        )


def path_of(site: str, strengths: list[float], chosen: float) -> dict:
    """The path of a site all of whose strengths are solved."""
    miou = [0.5] * len(strengths)
    return {
        "site": site,
        "strengths": strengths,
        "miou": miou,
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
    ("row", "site", "is_control", "missing"),
    [
        ("weaker", "encoder", False, [("adapter_drop", "weaker")]),
        ("all", "layer_01", False, []),
        ("all", "layer_03", False, [("recovery", row) for row in ROWS]),
        ("weaker", "adapter", True, [("adapter_drop", "weaker"), ("recovery_trained", "weaker")]),
    ],
)
def test_rows_count_if_the_sites_that_they_read_have_converged(
    row,
    site,
    is_control,
    missing,
    paths,
    root,
    tmp_path,
):
    """The encoder is read at that strength, the best layer is layer 3; the untrained model must converge, too."""

    def converged(name, of):
        return of != site or row not in ("all", name)

    curve = FLAT if is_control else CURVE
    options = {
        "root": root,
        "untrained": is_control,
        "converged": converged,
    }
    runs = [paths["solved"]] * is_control
    runs.append(write_solved(tmp_path / "run", [curve] * 3, **options))
    found = strengths_of(*studies_of(runs))
    assert [key for key, row in found.items() if not row["converged"]] == missing


# ------------------------------------------------------------------------------------------------ studies


def test_effects_never_mix_solved_and_trained_probes(paths, root, tmp_path):
    (study,) = studies_of([paths["sgd"], paths["solved_untrained"]])
    assert [str(run.path) for run in study.untrained.values()] == [paths["solved_untrained"]]
    assert "recovery_trained" not in {claim["claim"] for claim in evaluate_claims(study)}
    for controls, known in ((["sgd_untrained"], 0), (["sgd_untrained", "solved_untrained"], 1)):
        (study,) = studies_of([paths[name] for name in ("solved", *controls)])
        names = [claim["claim"] for claim in evaluate_claims(study)]
        assert names.count("recovery_trained") == known
    other = write_solved(tmp_path / "other", [CURVE] * 3, root=root, mask="bidirectional")
    (study,) = studies_of([other, paths["sgd"], paths["solved"]])
    assert [str(run.path) for run in study.pair()] == [paths["solved"], other]


def test_main_runs_of_all_masks_have_probes_of_one_kind(root, tmp_path, caplog):
    """Curves and Table 2 had shown trained probes of one mask beside solved ones of the other."""
    sgd = str(write_run(tmp_path / "sgd", CURVE, root=root))
    masks = ("causal", "bidirectional")
    solved = [
        write_solved(tmp_path / mask, [CURVE] * 3, root=root, mask=mask, seed=i)
        for i, mask in enumerate(masks)
    ]
    for runs, main, left_out in (
        ([sgd, *solved], solved, sgd),
        ([sgd, solved[1]], [sgd], solved[1]),
    ):
        (study,) = studies_of(runs)
        assert [str(run.path) for run in study.main_runs.values()] == main
        assert f"{left_out} is left out" in caplog.text
