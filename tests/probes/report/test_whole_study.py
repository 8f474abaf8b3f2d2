"""Reports over models and datasets, and mask comparison, on runs without a model."""

import json

import numpy as np
import pytest
import tiny_models
import torch
from probe_runs import write_run
from reference import miou_of_counts
from report_parts import studies_of

from probes.report.compare import compare_runs
from probes.runs.probe_run import ProbeRun

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
    (study,) = studies_of(pair)
    causal, bidirectional = study.pair()
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


def p_of_sites(paths) -> dict[str, float]:
    """Corrected p-values by site, of both masks."""
    rows = compare_runs(*studies_of(paths)[0].pair())
    return {row["site"]: row["p"] for row in rows if row["of"] == "site"}


def test_paired_tests_find_the_layers_that_differ(pair):
    p = p_of_sites(pair)
    assert p["final_norm"] is None, "it repeats the last layer"
    assert max(p["layer_02"], p["layer_03"]) < 0.01
    assert min(p["encoder"], p["adapter"]) > 0.05


def test_paired_tests_use_groups(root, tmp_path):
    """A clear gain, but three groups are too few."""
    paths = []
    for mask, shift in (("causal", 0.0), ("bidirectional", 0.05)):
        options = {"root": root, "mask": mask, "groups": torch.arange(40) % 3}
        paths.append(str(write_run(tmp_path / mask, [q + shift for q in CURVE], **options)))
    assert all(p is None or p > 0.2 for p in p_of_sites(paths).values())


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
        studies_of([pair[0], str(other)])
    with pytest.raises(ValueError, match="were scored on different images"):
        studies_of(
            [*pair, f"another={write_run(tmp_path / 'images', CURVE, root=root, images=30)}"]
        )
