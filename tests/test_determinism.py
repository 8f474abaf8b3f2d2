"""The same commands with the same seed leave the same bytes, in another process with other hash seeds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from processes import HANGING_S

from llava_bidir.cli import main as llava_bidir
from probes.cli import main as probes

ROOT = Path(__file__).parents[1]
# These tell time and host, in their names too. So does, by design, what the pipeline leaves out: `report --timings`
# (wall_s in results.json, the page's first line) and verify-data.json (seconds, records/s).
APART = "events.out.tfevents.*"


def everything(out: Path, hash_seed: str) -> dict[str, bytes]:
    """All files that the pipeline leaves in `out`, by name."""
    environment = os.environ | {
        "PYTHONHASHSEED": hash_seed,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "tests/helpers/demo_pipeline.py", str(out)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANGING_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    files = [path for path in out.rglob("*") if path.is_file() and not path.match(APART)]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.mark.nightly
def test_every_file_of_the_pipeline_has_the_same_bytes_again(tmp_path):
    """Both runs write into the same folder, for paths are in manifests."""
    first = everything(tmp_path / "run", "1")
    (tmp_path / "run").rename(tmp_path / "first")
    again = everything(tmp_path / "run", "2")
    assert set(first) == set(again)
    assert [name for name in sorted(first) if first[name] != again[name]] == []
    wanted = {
        "assets/captions.json",
        "assets/encoder/model.safetensors",
        "stage2/hf/model.safetensors",
    }
    wanted |= {
        "stage2/hf/training.json",
        "causal/checkpoints/last.ckpt",
        "causal/maps.safetensors",
        "causal/umap.json",
        "bidirectional/starvation.json",
    }
    of_a_run = ("metrics.json", "manifest.json", "counts.safetensors", "probes.safetensors")
    wanted |= {f"causal/{name}" for name in (*of_a_run, "knockout.json", "knockout.safetensors")}
    wanted |= {
        f"report/{name}"
        for name in ("index.html", "results.json", "explorer.html", "layers.png", "layers.pdf")
    }
    assert wanted <= set(first), "or not much was compared"


@pytest.fixture
def forgiving():
    """Lightning leaves the switch on."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
def test_deterministic_algorithms_change_no_training(
    forgiving,
    parts,
    conversations,
    tmp_path,
):
    """On a CPU; it also fills memory that nobody has written with NaN."""
    run = [
        "fit",
        *tiny_models.training_arguments(parts, conversations),
        "--trainer.accelerator",
        "cpu",
    ]
    run += [
        "--trainer.log_every_n_steps",
        "1",
    ]  # rates, which are not to be exported, are measured at each
    for out, more in (("as it is", []), ("deterministic", ["--trainer.deterministic", "true"])):
        llava_bidir([*run, "--out", str(tmp_path / out), *more])
    for name in ("model.safetensors", "training.json", "README.md"):
        assert (tmp_path / "deterministic/hf" / name).read_bytes() == (
            tmp_path / "as it is/hf" / name
        ).read_bytes()


@pytest.mark.slow
def test_deterministic_algorithms_change_no_probe(
    forgiving,
    checkpoints,
    segmentation,
    tmp_path,
):
    run = [
        "fit",
        "-c",
        "configs/demo/probes.yaml",
        "--model.mllm",
        str(checkpoints["causal"]),
        "--data.root",
    ]
    run += [str(segmentation), "--trainer.max_epochs", "2"]
    for out, more in (("as it is", []), ("deterministic", ["--trainer.deterministic", "true"])):
        probes([*run, "--out", str(tmp_path / out), *more])
    for name in ("metrics.json", "counts.safetensors", "probes.safetensors"):
        assert (tmp_path / "deterministic" / name).read_bytes() == (
            tmp_path / "as it is" / name
        ).read_bytes()
