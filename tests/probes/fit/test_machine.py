"""Where solved probes are computed: one process needs torch only, and has the same results as one of Lightning."""

import os
import sys

import own_modules
import pytest
import solving
import torch
from processes import run_command
from safetensors.torch import load_file

from probes import machine
from probes.cli import main
from probes.fit.lightning_machine import LightningMachine
from probes.machine import one_process
from probes.runs.probe_run import ProbeRun

# That of no other case, and that changes nothing.
LIGHTNING = ("--trainer.benchmark", "false")
RUN = """
import sys
from probes.cli import main
main(sys.argv[1:])
print("loaded:", *{name.partition(".")[0] for name in sys.modules})
"""
HEAVY = {"lightning", "torchmetrics", "deepspeed", "tensorboard", "umap"}


@pytest.fixture
def cpu(monkeypatch):
    """A machine without GPUs, and processes without a launcher."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in machine.COUNT_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accelerator": "cpu", "devices": 1, "precision": 32},
        {"devices": "1", "num_nodes": 1, "strategy": "ddp"},
        {"max_epochs": -1, "max_steps": 6320, "check_val_every_n_epoch": None},
        {"enable_progress_bar": False, "precision": "bf16-mixed"},
    ],
)
def test_one_process_is_torchs(options, cpu):
    found = one_process(options)
    assert found.device == torch.device("cpu")
    autocast = options.get("precision") == "bf16-mixed"
    with found.forward_context():
        assert torch.is_autocast_enabled("cpu") == autocast


@pytest.mark.parametrize(
    "options",
    [
        {"devices": 2},
        {"num_nodes": 2},
        {"devices": 2, "strategy": "ddp"},
        {"precision": "64-true"},
        {"precision": "bf17"},
        {"accelerator": "gpu"},
        {"logger": "CSVLogger"},
        {"limit_test_batches": 0.5},
        {"callbacks": ["EarlyStopping"]},
        {"max_epochs": "two"},
    ],
)
def test_several_processes_and_options_of_other_kinds_are_lightnings(options, cpu):
    """Lightning starts them, or says what is wrong with them."""
    assert one_process(options) is None


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_NTASKS"])
def test_processes_of_a_launcher_are_lightnings(variable, cpu, monkeypatch):
    monkeypatch.setenv(variable, "2")
    assert one_process({"devices": 1}) is None
    monkeypatch.setenv(variable, "1")
    assert one_process({"devices": 1}) is not None


def test_all_gpus_of_a_machine_are_used(cpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for count in (1, 2):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        found = one_process({})
        assert (found and found.device) == (torch.device("cuda", 0) if count == 1 else None)
        assert one_process({"devices": 1}).device.type == "cuda"
        assert one_process({"accelerator": "cpu"}).device.type == "cpu"


def test_both_machines_solve_the_same_probes_to_the_last_bit(
    checkpoints,
    segmentation,
    tmp_path,
    monkeypatch,
    caplog,
):
    """And each knows the run of the other as its own."""
    used = []
    monkeypatch.setattr(
        "probes.fit.lightning_machine.LightningMachine.run",
        lambda self, function: used.append(type(self)) or function(),
    )
    arguments = {
        name: solving.arguments(checkpoints["causal"], segmentation, tmp_path / name, *more)
        for name, more in (("torch", ()), ("lightning", LIGHTNING))
    }
    for words in arguments.values():
        main(words)
    assert used == [LightningMachine]
    runs = [ProbeRun(tmp_path / name) for name in arguments]
    for name in ("probes", "counts", "effects"):
        own, other = (load_file(run.path / f"{name}.safetensors") for run in runs)
        assert own.keys() == other.keys()
        assert all(torch.equal(x, other[key]) for key, x in own.items()), name
    assert runs[0].manifest["identity"] == runs[1].manifest["identity"]
    main([*arguments["torch"], *LIGHTNING, "--ckpt_path", "last"])
    assert "this run is finished; nothing to do" in caplog.text


def test_a_study_runs_without_lightning(segmentation, tmp_path):
    """Imports that wait in functions, too: of probes that are solved, their analyses and the report."""
    words = ["study", f"{own_modules.__file__}:build", segmentation, "--out", tmp_path / "study"]
    words += "--folds 2 --strengths 1e-1 --draws 1 --trainer.accelerator cpu".split()
    words += ["--model.sites", "[layer_00,layer_03]"]
    done = run_command([sys.executable, "-c", RUN, *words], env=os.environ | {"COLUMNS": "80"})
    loaded = set(done.stdout.rpartition("loaded:")[2].split())
    assert "torch" in loaded and (tmp_path / "study/report/index.html").is_file()
    assert not HEAVY & loaded
