"""Checksums of all files of a run, and comparison of two runs and of two exports."""

import json
import zlib
from pathlib import Path


def run_bytes(folder: Path) -> dict[str, int]:
    """Return the checksum of each file in `folder` except its lock and event files, which a refused command may add."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    kept = (path for path in files if not path.name.startswith((".", "events.out.tfevents")))
    return {str(path.relative_to(folder)): zlib.crc32(path.read_bytes()) for path in kept}


def assert_same_results(run: Path, other: Path) -> None:
    """Compare what two runs of probes have found byte by byte."""
    for name in ("probes.safetensors", "effects.safetensors", "counts.safetensors"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name


def assert_same_export(one: Path, other: Path) -> None:
    """Compare two exported models byte by byte; training.json may name the checkpoint that one was made from."""
    files = [run_bytes(folder) for folder in (one, other)]
    different = {name for name in files[0] | files[1] if files[0].get(name) != files[1].get(name)}
    assert different <= {"training.json"}, different
    facts = [json.loads((folder / "training.json").read_text()) for folder in (one, other)]
    for training in facts:
        training.pop("checkpoint", None)
    assert facts[0] == facts[1]
