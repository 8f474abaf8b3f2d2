"""Accuracy by patch, also with the classes held fixed."""

import pytest
import torch

from llava_bidir.common.bootstrap import bootstrap_weights
from llava_bidir.common.errors import UserError
from probes.analyses.starvation.by_class import standardised_gap
from probes.analyses.starvation.patch_accuracy import PatchCounts
from probes.analyses.starvation.run import starvation
from probes.runs.probe_run import ProbeRun

N = 80
T = 16
K = 3


def standardised_by_loop(
    counts,
    labels,
    share,
    patch: int,
) -> dict[str, float]:
    expected = {}
    for mask, (right, valid) in counts.items():
        accuracy = 0.0
        mix = 0.0
        for k in range(K):
            images = [n for n in range(N) if labels[n, patch] == k]
            if images:
                accuracy += (
                    share[k]
                    * sum(right[n, patch] for n in images)
                    / sum(valid[n, patch] for n in images)
                )
                mix += share[k]
        expected[mask] = float(accuracy / mix)
    return expected


def test_standardised_gap_equals_a_loop():
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(-1, K, (N, T), generator=generator)
    labels[:, 5] = 1  # two of the classes never occur at this patch
    valid = torch.randint(1, 100, (N, T), generator=generator).double()

    def right():
        return (valid * torch.rand(N, T, generator=generator)).floor()

    counts = {mask: PatchCounts(right(), valid) for mask in ("causal", "bidirectional")}
    share = torch.tensor([0.6, 0.3, 0.1], dtype=torch.double)
    result = standardised_gap(counts, labels, share, bootstrap_weights(N, 50).double())
    for patch in range(T):
        expected = standardised_by_loop(counts, labels, share, patch)
        expected["gap"] = expected["bidirectional"] - expected["causal"]
        assert {key: result[key][patch] for key in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"probe": {"feature_norm": "layernorm"}},
            "their probes differ in feature_norm, .* and 'layernorm'",
        ),
        ({"match": "update"}, "differ in match, 'none' and 'update'"),
        ({"draw": 1}, "differ in draw, 0 and 1"),
    ],
)
def test_runs_of_other_probes_or_controls_are_not_compared(runs, change, message):
    other = ProbeRun(runs["bidirectional"].path)
    probe = other.metrics["probe"] | change.get("probe", {})
    other.metrics = {
        **other.metrics,
        **change,
        "probe": probe,
    }
    with pytest.raises(UserError, match=message):
        starvation(runs["causal"], other, "layer_01")
