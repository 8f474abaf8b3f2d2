"""Purity of neighbourhoods against scikit-learn, token by token."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import NearestNeighbors

from probes.score.knn_purity import knn_purity

pytestmark = pytest.mark.numerics


def purity_of_image(states: np.ndarray, labels: np.ndarray, k: int = 10) -> float:
    states = states[labels >= 0]
    labels = labels[labels >= 0]
    search = NearestNeighbors(
        n_neighbors=k,
        metric="cosine",
        algorithm="brute",
    ).fit(states)
    nearest = search.kneighbors(return_distance=False)  # of the fitted points, each without itself
    return (labels[nearest] == labels[:, None]).mean()


def test_purity_equals_scikit_learns_and_needs_eleven_labelled_tokens():
    """States lie around a direction of their class; some tokens have no label."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 3, (5, 20), generator=generator)
    states = (
        3.0 * torch.randn(5, 20, 9, generator=generator)
        + 4.0 * torch.randn(4, 9, generator=generator)[labels + 1]
    )
    labels[1] = torch.tensor(
        [0] * 5 + [1] * 5 + [-1] * 10
    )  # ten labelled tokens have nine neighbours each
    labels[4] = -1
    found = knn_purity(F.normalize(states, dim=-1), labels)
    expected = [purity_of_image(states[i].numpy(), labels[i].numpy()) for i in (0, 2, 3)]
    assert found[[0, 2, 3]].tolist() == pytest.approx(expected)
    assert found[[1, 4]].isnan().all()
    assert 0.4 < np.mean(expected) < 0.99, "else the test cannot detect errors"
