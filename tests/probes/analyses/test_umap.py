"""UMAP of patches, and the numbers from the original space."""

import sys
from importlib.util import find_spec

import numpy as np
import probe_runs
import pytest
import torch

from probes.analyses import ANALYSES
from probes.analyses.base import PlannedRun
from probes.analyses.umap.run import embed, umap_of_images
from probes.cli import main

pytestmark = pytest.mark.skipif(
    find_spec("umap") is None, reason="umap-learn (extra: figures) is not installed"
)


def purity_by_loop(x: np.ndarray, labels: list[int], neighbours: int) -> float:
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    shares = []
    for i in range(len(x)):
        order = sorted(
            (j for j in range(len(x)) if j != i), key=lambda j: -float(unit[i] @ unit[j])
        )[:neighbours]
        shares.append(np.mean([labels[j] == labels[i] for j in order]))
    return float(np.mean(shares))


def test_purity_leaves_out_unlabelled_patches():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 8, generator=generator)
    labels = torch.randint(-1, 3, (20,), generator=generator)
    threads = torch.get_num_threads()
    result = embed(x, labels, 0)
    known = labels >= 0
    assert result["knn_purity"] == pytest.approx(
        purity_by_loop(x[known].numpy(), labels[known].tolist(), 10)
    )
    assert np.array(result["xy"]).shape == (20, 2)
    assert -1 <= result["silhouette"] <= 1
    assert embed(x, labels.clamp(0, 0), 0)["silhouette"] is None, "one class"
    assert embed(x[:10], labels[:10], 0)["knn_purity"] is None, "too few patches"
    assert torch.get_num_threads() == threads, (
        "other threads, other last bits of whatever this process computes next"
    )


def test_default_sites_are_those_of_the_run(checkpoints, segmentation, tmp_path):
    one, none = (
        probe_runs.fit(
            checkpoints["causal"],
            segmentation,
            tmp_path / sites,
            "--model.sites",
            sites,
        )
        for sites in ("[layer_02]", "[encoder,adapter]")
    )
    (image,) = umap_of_images(one, [0])["images"]
    assert [site["site"] for site in image["sites"]] == ["adapter", "layer_02"]
    with pytest.raises(
        SystemExit, match="^probes: .* has no decoder layer, and so no best one; choose --sites"
    ):
        main(["umap", "--probes", str(none.path), "--image", "0"])


def test_without_umap_learn_the_extra_is_named_and_a_study_leaves_it_out(
    runs, monkeypatch, tmp_path
):
    sites = ["adapter", "layer_01"]
    planned = [PlannedRun("trained", "causal", sites, sites)]
    assert ANALYSES["umap"].why_left_out(planned, {}) == ""
    monkeypatch.setitem(sys.modules, "umap", None)
    install = "umap-learn is not installed; run: pip install 'llava-bidir[figures]'"
    assert ANALYSES["umap"].why_left_out(planned, {}) == install
    with pytest.raises(SystemExit) as stop:
        main(["umap", "--probes", str(runs["causal"].path), "--out", str(tmp_path)])
    assert stop.value.code == f"probes: {install}"
    assert not (tmp_path / "umap.json").exists()
