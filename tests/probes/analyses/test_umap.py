"""UMAP without its package."""

import sys
from importlib.util import find_spec

import pytest

from probes.analyses import ANALYSES
from probes.analyses.base import PlannedRun
from probes.cli import main

pytestmark = pytest.mark.skipif(
    find_spec("umap") is None, reason="umap-learn (extra: figures) is not installed"
)


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
