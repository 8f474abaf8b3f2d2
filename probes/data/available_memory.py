"""Memory that this process can still use: of the machine, and of the control groups of its job or container."""

from pathlib import Path

import psutil

# limit, use, and the key of the part of the use that the kernel frees on demand, by controller of /proc/self/cgroup
FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),  # version 2
    # version 1
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available_memory(
    own: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> int:
    """Return the available memory in bytes; cached files count as available."""
    available = [psutil.virtual_memory().available]
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controller, path = line.split(":", 2)
        if controller in FILES:
            parts = Path(path).relative_to("/").parts
            groups = [
                (mount / controller).joinpath(*parts[:depth]) for depth in range(len(parts) + 1)
            ]
            available += [
                _available_in(group, *FILES[controller])
                for group in groups
                if _has_limit(group, controller)
            ]
    return min(available)


def _has_limit(group: Path, controller: str) -> bool:
    file = group / FILES[controller][0]
    return file.exists() and file.read_text().strip() != "max"


def _available_in(
    group: Path,
    limit: str,
    use: str,
    cached: str,
) -> int:
    def read(name):
        return (group / name).read_text()

    statistics = dict(line.split() for line in read("memory.stat").splitlines())
    return int(read(limit)) - int(read(use)) + int(statistics[cached])
