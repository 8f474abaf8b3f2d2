"""A Slurm cluster for the tests of this folder: local_cluster.sh, started if it is not running."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from processes import HANGING_S

LOCAL_CLUSTER = Path(__file__).with_name("local_cluster.sh")


@pytest.fixture(scope="session")
def cluster():
    """Start the local cluster, or skip if that is impossible. A cluster that was running before keeps running."""
    name = _cluster_name()
    if name == "llava-bidir-local":
        yield
        return
    if name:
        pytest.skip(f"this machine belongs to the Slurm cluster {name}; tests don't submit to it")
    if os.geteuid():
        pytest.skip("tests/slurm/local_cluster.sh must run as root")
    if not shutil.which("slurmctld") and not shutil.which("apt-get"):
        pytest.skip("Slurm is not installed, and neither is apt-get to install it")
    started = subprocess.run(
        [LOCAL_CLUSTER, "up"], capture_output=True, text=True, timeout=HANGING_S
    )
    if started.returncode and not shutil.which("slurmctld"):
        pytest.skip(f"Slurm could not be installed: {started.stderr.strip()[-300:]}")
    assert started.returncode == 0, started.stderr
    yield
    subprocess.run([LOCAL_CLUSTER, "down"], check=True)


def _cluster_name() -> str | None:
    """Return the name of the Slurm cluster of this machine, if there is one."""
    if not shutil.which("scontrol"):
        return None
    config = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True).stdout
    match = re.search(r"^ClusterName\s*=\s*(\S+)", config, re.MULTILINE)
    return match and match[1]
