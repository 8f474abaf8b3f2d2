"""Probe runs that the tests of all analyses share."""

import pytest
import tiny_models

from probes.cli import main
from probes.results.probe_run import ProbeRun


@pytest.fixture(scope="session")
def runs(checkpoints, tmp_path_factory) -> dict[str, ProbeRun]:
    """A causal and a bidirectional run on images whose patches are often confused."""
    root = tiny_models.write_segmentation(tmp_path_factory.mktemp("data"), training=4, validation=9, seed=5)
    paths = {mask: tmp_path_factory.mktemp(mask) for mask in ("causal", "bidirectional")}
    for mask, path in paths.items():
        main(
            ["fit", "-c", "configs/demo/probes.yaml", "--out", str(path), "--trainer.max_epochs", "1"]
            + ["--model.mllm", str(checkpoints[mask]), "--data.root", str(root), "--data.batch_size", "2"]
        )
    return {mask: ProbeRun(path) for mask, path in paths.items()}
