"""Memory that this process can still use: of the machine, and of the control groups of its job or container."""

import math
from pathlib import Path

import psutil

# limit, use, and the key of the part of the use that the kernel frees on demand, by controller of /proc/self/cgroup
FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),  # version 2
    # version 1
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available_memory(
    cgroups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> int:
    """Return the available memory in bytes; cached files count as available."""
    available = [psutil.virtual_memory().available]
    lines = []
    if cgroups.exists():
        lines = cgroups.read_text().splitlines()
    for line in lines:
        _, controller, path = line.split(":", 2)
        if controller in FILES:
            group = mount / controller / path.removeprefix("/")
            for folder in (group, *group.parents):
                available.append(_available_in(folder, *FILES[controller]))
    return int(min(available))


def _available_in(group: Path, limit: str, use: str, cached: str) -> float:
    """Return what is left of the limit of a group, in bytes; infinity if it has none."""
    if not (group / limit).exists() or (group / limit).read_text().strip() == "max":
        return math.inf
    statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    used = int((group / use).read_text()) - int(statistics[cached])
    return int((group / limit).read_text()) - used
