"""A report reads what runs have counted site by site: its memory does not grow with the number of sites."""

import json
from pathlib import Path

import numpy as np
import probe_runs
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from probes.cli import main
from probes.runs import read
from probes.runs.read import ProbeRun

IMAGES = 40
CLASSES = 20
RESAMPLINGS = 2000
SITES = 12
OF_A_SITE = (
    RESAMPLINGS * 3 * CLASSES
)  # sums of right, predicted and labelled pixels of all resamplings


class LargestResult(TorchDispatchMode):
    """Notes the largest tensor that an operation returns; of views, that of the memory that they are views of."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(
        self,
        func,
        types,
        args=(),
        kwargs=None,
    ):
        out = func(*args, **kwargs or {})
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                held = x.untyped_storage().nbytes() // x.element_size()
                self.numbers = max(self.numbers, held)
        return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[str]:
    """Both masks and an untrained model."""
    folder = tmp_path_factory.mktemp("wide")
    palette = np.random.default_rng(0).integers(0, 255, (CLASSES, 3)).tolist()
    classes = {"classes": [f"class {i}" for i in range(CLASSES)], "palette": palette}
    (folder / "classes.json").write_text(json.dumps(classes))
    quality = np.linspace(0.5, 0.7, SITES).tolist()
    kinds = {
        "causal": {},
        "bidirectional": {"mask": "bidirectional"},
        "untrained": {"untrained": True, "seed": 1},
    }
    for name, more in kinds.items():
        probe_runs.write_run(
            folder / name,
            quality,
            root=folder,
            images=IMAGES,
            **more,
        )
    return [str(folder / name) for name in kinds]


def test_scores_of_part_of_the_sites_are_those_of_all_to_the_last_bit(runs, monkeypatch):
    at_once = ProbeRun(runs[0]).site_scores
    monkeypatch.setattr(read, "NUMBERS_AT_ONCE", 1)
    run = ProbeRun(runs[0])
    for site, estimate in run.site_scores.items():
        assert torch.equal(estimate.vector, at_once[site].vector), site
        assert estimate.ci95 == at_once[site].ci95
    assert torch.equal(
        run.sums_at(run.sites), torch.cat([run.sums_at([site]) for site in run.sites])
    )


def test_a_report_never_holds_the_counts_of_all_sites(runs, monkeypatch, tmp_path):
    folder = str(Path(runs[0]).parent)
    main(["report", folder, "--out", str(tmp_path / "at_once")])
    monkeypatch.setattr(read, "NUMBERS_AT_ONCE", 1)
    with LargestResult() as largest:
        main(["report", folder, "--out", str(tmp_path / "by_site")])
    assert OF_A_SITE <= largest.numbers <= 2 * OF_A_SITE < SITES * OF_A_SITE
    for file in ("index.html", "results.json", "sites.csv"):
        both = [(tmp_path / out / file) for out in ("at_once", "by_site")]
        assert both[0].read_bytes() == both[1].read_bytes(), file
