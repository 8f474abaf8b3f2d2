"""UMAP without its package; purity of neighbourhoods against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from probes.analyses.umap import knn_purity


@pytest.mark.numerics
def test_purity_equals_scikit_learns_and_needs_eleven_labelled_tokens():
    """States lie around a direction of their class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (60,), generator=generator)
    directions = 4.0 * torch.randn(3, 9, generator=generator)
    states = 3.0 * torch.randn(60, 9, generator=generator) + directions[labels]
    search = NearestNeighbors(n_neighbors=10, metric="cosine", algorithm="brute").fit(
        states.numpy()
    )
    nearest = search.kneighbors(return_distance=False)  # of the fitted points, each without itself
    expected = np.mean(labels.numpy()[nearest] == labels.numpy()[:, None])
    assert knn_purity(states, labels) == pytest.approx(expected)
    assert 0.4 < expected < 0.99, "else the test cannot detect errors"
    assert knn_purity(states[:10], labels[:10]) is None
