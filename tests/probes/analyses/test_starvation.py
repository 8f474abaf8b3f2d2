"""Accuracy by patch, also with the classes held fixed."""

import pytest
import torch

from llava_bidir.common.bootstrap import bootstrap_weights
from probes.analyses.starvation.starvation_section import (
    accuracy_grids,
    gaps,
    standardised_accuracy,
)

N = 80
T = 16
K = 3
COLUMNS = 4


def standardised_by_loop(right, valid, labels, share, patches: range) -> float:
    accuracy = 0.0
    mix = 0.0
    for k in range(K):
        cells = [(n, t) for n in range(N) for t in patches if labels[n, t] == k]
        if cells:
            accuracy += share[k] * sum(right[c] for c in cells) / sum(valid[c] for c in cells)
            mix += share[k]
    return float(accuracy / mix)


def test_standardised_gap_equals_a_loop():
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(-1, K, (N, T), generator=generator)
    labels[:, 5] = 1  # two of the classes never occur at this patch
    valid = torch.randint(1, 100, (N, T), generator=generator)
    right = {
        mask: (valid * torch.rand(N, T, generator=generator)).long()
        for mask in ("causal", "bidirectional")
    }
    share = torch.tensor([0.6, 0.3, 0.1], dtype=torch.double)
    weights = torch.cat([torch.ones(1, N), bootstrap_weights(N, 50)]).double()
    standardised = gaps(
        standardised_accuracy(
            right, valid=valid, labels=labels, share=share, weights=weights, columns=COLUMNS
        )
    )
    places = {**{t: range(t, t + 1) for t in range(T)}, "first_row": range(COLUMNS)}
    for place, patches in places.items():
        expected = {
            mask: standardised_by_loop(x, valid=valid, labels=labels, share=share, patches=patches)
            for mask, x in right.items()
        }
        expected["gap"] = expected["bidirectional"] - expected["causal"]
        of_place = standardised.get(place) or {key: standardised[key][place] for key in expected}
        assert {key: of_place[key] for key in expected} == pytest.approx(expected)


def test_grids_name_the_first_patch_and_the_mean_of_the_first_row():
    result = {"grid": [2, 2], "causal": [0.2, 0.4, 0.9, 0.9]}
    result |= {"bidirectional": [0.5, 0.6, 0.9, 0.9], "gap": [-0.3, 0.2, 0.0, 0.0]}
    assert [grid.unit for grid in accuracy_grids(result, ("causal", "bidirectional"))] == [
        "first patch 20.0%, first row 30.0%",
        "first patch 50.0%, first row 55.0%",
        "first patch −30.0, first row −5.0",
    ]


def test_the_class_of_a_patch_is_that_of_most_of_its_pixels(runs):
    run = runs["causal"]
    patches = run.mllm().geometry.patches
    expected = [patches(sample["target"]).flatten() for sample in run.dataset()]
    assert torch.equal(run.patch_classes, torch.stack(expected))
