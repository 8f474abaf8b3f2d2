"""Checksums of all files of a run."""

import zlib
from pathlib import Path


def run_bytes(folder: Path) -> dict[str, int]:
    """Return the checksum of each file in `folder` except its lock and event files, which a refused command may add."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    kept = (path for path in files if not path.name.startswith((".", "events.out.tfevents")))
    return {str(path.relative_to(folder)): zlib.crc32(path.read_bytes()) for path in kept}
