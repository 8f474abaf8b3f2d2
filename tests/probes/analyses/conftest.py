"""Probe runs that the tests of all analyses share."""

import probe_runs
import pytest
import tiny_models

from probes.runs.read import ProbeRun


@pytest.fixture(scope="session")
def runs(checkpoints, tmp_path_factory) -> dict[str, ProbeRun]:
    """A causal and a bidirectional run on images whose patches are often confused."""
    root = tiny_models.write_segmentation(
        tmp_path_factory.mktemp("data"), training=4, validation=9, seed=5
    )

    def fit(mask):
        return probe_runs.fit(
            checkpoints[mask], root, tmp_path_factory.mktemp(mask), "--data.batch_size", "2"
        )

    return {mask: fit(mask) for mask in ("causal", "bidirectional")}
