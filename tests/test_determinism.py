"""The same commands with the same seed leave the same bytes, in another process with other hash seeds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# TensorBoard's events tell time and host, in their names too, and verify-data how long it took; Lightning's checkpoints
# are pickles, whose tensors are compared where they matter, in what is made of them.
APART = ("events.out.tfevents.*", "*.ckpt")


def everything(out: Path, hash_seed: str) -> dict[str, bytes]:
    """All files that the pipeline leaves in `out`, by name."""
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "tests/pipeline.py", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    files = [path for path in out.rglob("*") if path.is_file() and not any(path.match(name) for name in APART)]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.mark.slow
def test_every_file_of_the_pipeline_has_the_same_bytes_again(tmp_path):
    """Both runs write into the same folder, for paths are in manifests."""
    first = everything(tmp_path / "run", "1")
    (tmp_path / "run").rename(tmp_path / "first")
    again = everything(tmp_path / "run", "2")
    assert set(first) == set(again)
    assert [name for name in sorted(first) if first[name] != again[name]] == []
    wanted = {"assets/captions.json", "assets/encoder/model.safetensors", "stage2/hf/model.safetensors"}
    wanted |= {"stage2/hf/training.json", "causal/maps.safetensors", "causal/umap.json", "bidirectional/starvation.json"}
    of_a_run = ("metrics.json", "manifest.json", "counts.safetensors", "probes.safetensors", "recipes.safetensors")
    wanted |= {f"causal/{name}" for name in (*of_a_run, "knockout.json", "knockout.safetensors")}
    wanted |= {f"report/{name}" for name in ("index.html", "results.json", "explorer.html", "layers.png", "layers.pdf")}
    assert wanted <= set(first), "or not much was compared"
