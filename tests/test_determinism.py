"""The same commands with the same seed leave the same bytes, in another process with other hash seeds."""

import os
import sys
from pathlib import Path

import probe_runs
import pytest
import tiny_models
import torch
from processes import run_command

ROOT = Path(__file__).parents[1]
# These tell time and host, in their names too. So does, by design, what the pipeline leaves out: verify-data.json
# (seconds, records/s).
APART = "events.out.tfevents.*"


def everything(out: Path, hash_seed: str) -> dict[str, bytes]:
    """All files that the pipeline leaves in `out`, by name."""
    environment = os.environ | {
        "PYTHONHASHSEED": hash_seed,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "tests/helpers/demo_pipeline.py", out]
    run_command(command, cwd=ROOT, env=environment)
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
    of_a_run = "metrics.json manifest.json counts.safetensors probes.safetensors knockout.json"
    of_a_run += " knockout.safetensors checkpoints/last.ckpt maps.safetensors umap.json"
    wanted = {f"causal/{name}" for name in of_a_run.split()}
    of_a_report = "index.html results.json layers.png layers.pdf"
    wanted |= {f"report/{name}" for name in of_a_report.split()}
    wanted |= {"assets/captions.json", "assets/encoder/model.safetensors"}
    wanted |= {"stage2/hf/model.safetensors", "stage2/hf/training.json"}
    wanted |= {"causal/sinks.json"}
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
    # rates, which are not to be exported, are measured at each step
    same = ["--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1"]
    for out, more in (("as it is", []), ("deterministic", ["--trainer.deterministic", "true"])):
        tiny_models.fit(parts, conversations, tmp_path / out, *same, *more)
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
    for out, more in (("as it is", []), ("deterministic", ["--trainer.deterministic", "true"])):
        longer = ["--trainer.max_epochs", "2", *more]
        probe_runs.fit(checkpoints["causal"], segmentation, tmp_path / out, *longer)
    for name in ("metrics.json", "counts.safetensors", "probes.safetensors"):
        assert (tmp_path / "deterministic" / name).read_bytes() == (
            tmp_path / "as it is" / name
        ).read_bytes()
