"""UMAP without its package; purity of neighbourhoods against scikit-learn."""

import re
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from probes.analyses import ANALYSES
from probes.analyses.base import PlannedRun
from probes.analyses.umap import knn_purity
from probes.cli import main


@pytest.mark.skipif(
    find_spec("umap") is None, reason="umap-learn (extra: figures) is not installed"
)
def test_without_umap_learn_the_extra_is_named_and_a_study_leaves_it_out(
    runs, monkeypatch, tmp_path
):
    sites = ["adapter", "layer_01"]
    planned = PlannedRun("trained", "causal", sites, sites)
    monkeypatch.setitem(sys.modules, "umap", None)
    install = "umap-learn is not installed; run: pip install 'llava-bidir[figures]'"
    assert ANALYSES["umap"].why_left_out(planned, {}) == install
    with pytest.raises(SystemExit, match=re.escape(install)):
        main(["umap", "--probes", str(runs["causal"].path), "--out", str(tmp_path)])


@pytest.mark.numerics
def test_purity_equals_scikit_learns_and_needs_eleven_labelled_tokens():
    """States lie around a direction of their class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (60,), generator=generator)
    directions = 4.0 * torch.randn(3, 9, generator=generator)
    states = 3.0 * torch.randn(60, 9, generator=generator) + directions[labels]
    search = NearestNeighbors(
        n_neighbors=10,
        metric="cosine",
        algorithm="brute",
    ).fit(states.numpy())
    nearest = search.kneighbors(return_distance=False)  # of the fitted points, each without itself
    expected = np.mean(labels.numpy()[nearest] == labels.numpy()[:, None])
    assert knn_purity(states, labels) == pytest.approx(expected)
    assert 0.4 < expected < 0.99, "else the test cannot detect errors"
    assert knn_purity(states[:10], labels[:10]) is None
