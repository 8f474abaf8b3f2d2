"""Available memory, of the machine and of control groups of both versions."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from probes.data.available_memory import available_memory

GB = 10**9


def write_group(folder: Path, version: int, limit: int | str, use: int, cached: int = 0) -> None:
    """Write the files of a control group, as the kernel does."""
    names = {1: ("limit_in_bytes", "usage_in_bytes"), 2: ("max", "current")}[version]
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, use), strict=True):
        (folder / f"memory.{name}").write_text(f"{value}\n")
    total = "total_" if version == 1 else ""
    (folder / "memory.stat").write_text(f"inactive_file 0\n{total}inactive_file {cached}\n")


@pytest.mark.parametrize(
    ("own", "root", "version"),
    [
        ("0::/slurm/job_1\n", "", 2),
        ("5:cpu,cpuacct:/x\n4:memory:/slurm/job_1\n0::/\n", "memory", 1),
    ],
)
def test_limits_of_all_groups_count_and_cached_files_do_not(
    own, root, version, monkeypatch, tmp_path
):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100 * GB))
    (tmp_path / "own").write_text(own)

    def available():
        return available_memory(tmp_path / "own", tmp_path / "mount")

    assert available() == 100 * GB, "the files of the groups are not visible"
    unlimited = "max" if version == 2 else 2**63 - 4096
    group = tmp_path / "mount" / root / "slurm"
    write_group(group, version=version, limit=unlimited, use=90 * GB)
    write_group(group / "job_1", version, 64 * GB, 60 * GB, cached=40 * GB)
    assert available() == 44 * GB
    write_group(group, version=version, limit=91 * GB, use=90 * GB)
    assert available() == 1 * GB, "the limit of the parent"
