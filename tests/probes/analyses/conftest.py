"""Probe runs that the tests of all analyses share."""

import probe_runs
import pytest

from probes.results.probe_run import ProbeRun


@pytest.fixture(scope="session")
def runs(checkpoints, tmp_path_factory) -> dict[str, ProbeRun]:
    return probe_runs.fit_two_masks(checkpoints, tmp_path_factory.mktemp("runs"))
