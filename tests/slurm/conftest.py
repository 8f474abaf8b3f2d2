"""A Slurm for the tests of this folder: the machine's local cluster, brought up for them if need be."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

LOCAL_CLUSTER = Path(__file__).parents[2] / "slurm/local_cluster.sh"


@pytest.fixture(scope="session")
def cluster():
    """Skips where there is none and none can be had. A cluster that was up before stays up."""
    up = _cluster_name()
    if up == "llava-bidir-local":
        yield
        return
    if up:
        pytest.skip(f"this machine belongs to the Slurm cluster {up}; tests don't submit to it")
    if os.geteuid():
        pytest.skip("slurm/local_cluster.sh needs root, to bring up a Slurm")
    if not shutil.which("slurmctld") and not shutil.which("apt-get"):
        pytest.skip("Slurm is not installed, and there is no apt-get to install it with")
    started = subprocess.run([LOCAL_CLUSTER, "up"], capture_output=True, text=True, timeout=300)
    if started.returncode and not shutil.which("slurmctld"):
        pytest.skip(f"Slurm could not be installed: {started.stderr.strip()[-300:]}")
    assert started.returncode == 0, started.stderr
    yield
    subprocess.run([LOCAL_CLUSTER, "down"], check=True, timeout=60)


def _cluster_name() -> str | None:
    """Of the Slurm that this machine belongs to, if it answers."""
    if not shutil.which("scontrol"):
        return None
    shown = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True)
    names = [line.split("=")[1].strip() for line in shown.stdout.splitlines() if line.startswith("ClusterName")]
    return names[0] if names else None
