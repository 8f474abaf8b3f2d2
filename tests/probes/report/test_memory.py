"""A report reads what runs have counted site by site: its memory does not grow with the number of sites."""

import json

import numpy as np
import probe_runs
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from probes.cli import main
from probes.runs import read

CLASSES = 20
RESAMPLINGS = 2000
SITES = 12
OF_A_SITE = (
    RESAMPLINGS * 3 * CLASSES
)  # sums of right, predicted and labelled pixels of all resamplings


class LargestResult(TorchDispatchMode):
    """Notes the largest tensor that an operation returns; of views, that of the memory that they are views of."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                held = x.untyped_storage().nbytes() // x.element_size()
                self.numbers = max(self.numbers, held)
        return out


def test_a_report_never_holds_the_counts_of_all_sites_and_is_the_same_to_the_last_bit(
    monkeypatch, tmp_path
):
    study = tmp_path / "study"
    study.mkdir()
    classes = [f"class {i}" for i in range(CLASSES)]
    (study / "classes.json").write_text(json.dumps({"classes": classes}))
    quality = np.linspace(0.5, 0.7, SITES).tolist()
    for mask in ("causal", "bidirectional"):
        probe_runs.write_run(study / mask, quality, root=study, mask=mask)
    probe_runs.write_run(study / "untrained", quality, root=study, untrained=True, seed=1)
    main(["report", str(study), "--out", str(tmp_path / "at_once")])
    monkeypatch.setattr(read, "NUMBERS_AT_ONCE", 1)
    with LargestResult() as largest:
        main(["report", str(study), "--out", str(tmp_path / "by_site")])
    assert OF_A_SITE <= largest.numbers <= 2 * OF_A_SITE < SITES * OF_A_SITE
    for file in ("index.html", "results.json", "sites.csv"):
        both = [(tmp_path / out / file).read_bytes() for out in ("at_once", "by_site")]
        assert both[0] == both[1], file
