"""Reports over models and datasets, and mask comparison, on runs without a model."""

import json

import numpy as np
import pytest
import tiny_models
import torch
from probe_runs import write_run
from reference import miou_of_counts

from probes.report.mask_comparison import compare_masks
from probes.runs.probe_run import ProbeRun
from probes.runs.study import read_studies

CURVE = [0.6, 0.5, 0.55, 0.62, 0.7, 0.7]  # encoder, adapter, layers 1 to 3, final norm


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_models.write_segmentation(tmp_path_factory.mktemp("data"), 1, 1)


@pytest.fixture(scope="module")
def pair(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    better = [q + 0.04 * (i > 2) for i, q in enumerate(CURVE)]
    return [
        str(write_run(folder / "causal", CURVE, root=root)),
        str(write_run(folder / "bidirectional", better, root=root, mask="bidirectional")),
    ]


def miou(run: ProbeRun, weights=None) -> np.ndarray:
    """mIoU by site, f[S], or f[S, R] under the multiplicities of images `weights` f[R, N]."""
    right, predicted, labelled = run.counts[:3]
    pairs = zip(right, predicted, strict=True)
    return np.array([miou_of_counts(i, p, labelled, weights) for i, p in pairs])


def test_paired_differences_and_intervals_equal_numpy(pair):
    """The half width is the 95% quantile of the distance of resampled values from their mean."""
    (study,) = read_studies(pair)
    comparison = compare_masks(study, 50)
    causal, bidirectional = study.pair()
    difference = miou(bidirectional) - miou(causal)
    resampled = miou(bidirectional, causal.weights) - miou(causal, causal.weights)
    for i, entry in enumerate(comparison["sites"]):
        assert entry["site"] == causal.sites[i]
        assert entry["difference"] == pytest.approx(difference[i])
        half = np.quantile(np.abs(resampled[i] - resampled[i].mean()), 0.95)
        expected = [difference[i] - half, difference[i] + half]
        assert entry["ci95"] == pytest.approx(expected, abs=1e-5)
    effects = {entry["effect"]: entry["difference"] for entry in comparison["effects"]}
    assert effects["adapter_drop"] == pytest.approx(difference[0] - difference[1])
    peaks = [miou(run)[2:5].max() for run in (causal, bidirectional)]
    assert effects["recovery"] == pytest.approx(peaks[1] - peaks[0] - difference[1])


def test_paired_tests_find_the_layers_that_differ(pair):
    comparison = compare_masks(read_studies(pair)[0])
    p = {entry["site"]: entry["p_corrected"] for entry in comparison["sites"]}
    assert "final_norm" not in p
    assert p["layer_02"] < 0.01
    assert p["layer_03"] < 0.01
    assert p["encoder"] > 0.05
    assert p["adapter"] > 0.05
    p = {entry["effect"]: entry["p"] for entry in comparison["effects"]}
    assert p["adapter_drop"] > 0.01
    assert p["recovery"] < 0.01
    assert comparison["smallest_p"] == 1 / 2001
    assert comparison["groups"] is None


def test_paired_tests_use_groups(root, tmp_path, pair):
    groups = torch.arange(40) % 3
    paths = [
        str(
            write_run(
                tmp_path / mask,
                [q + shift for q in CURVE],
                root=root,
                mask=mask,
                groups=groups,
            )
        )
        for mask, shift in (("causal", 0.0), ("bidirectional", 0.05))
    ]
    comparison = compare_masks(read_studies(paths)[0])
    assert comparison["groups"] == 3
    assert comparison["smallest_p"] == 0.25
    assert all(
        entry["p"] > 0.2 for entry in comparison["sites"]
    )  # a clear gain, but three groups are too few


def test_runs_that_differ_are_not_compared(root, tmp_path, pair):
    probe = json.loads((ProbeRun(pair[1]).path / "metrics.json").read_text())["probe"] | {
        "feature_norm": "batchnorm"
    }
    other = write_run(
        tmp_path / "run",
        CURVE,
        root=root,
        mask="bidirectional",
        metrics={"probe": probe},
    )
    with pytest.raises(
        ValueError, match="their probes differ in feature_norm, 'none' and 'batchnorm'"
    ):
        read_studies([pair[0], str(other)])
    with pytest.raises(ValueError, match="were scored on different images"):
        read_studies(
            [*pair, f"another={write_run(tmp_path / 'images', CURVE, root=root, images=30)}"]
        )
